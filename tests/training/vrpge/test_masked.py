"""Layers that compute with some of their units."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.topology import to_dense
from sparsekern.training.vrpge.budget import Budget
from sparsekern.training.vrpge.candidates import Candidates
from sparsekern.training.vrpge.masked import MaskedLayers, masked_passes


def test_all_layers_compute_with_the_units_of_a_mask_in_the_same_tensors():
    model = sk.sparsify_(nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8)), 0.25, 4, seed=0)
    candidates = {name: Candidates(layer, "row") for name, layer in sk.sparse_layers(model).items()}
    budget = Budget(candidates, None, "global", None, 0.0, "sort")
    masked = MaskedLayers(candidates, budget)
    x, addresses = torch.randn(3, 8), set()
    for number in range(budget.units):
        units = torch.arange(budget.units) != number
        with masked.lending(units):
            y = model(x)
            addresses.add(model[0].index.row_slot.data_ptr())
        weights = [
            to_dense(model[at].topology, model[at].values.detach() * masked.slots(str(at), units).view(-1, 1, 1))
            for at in (0, 2)
        ]
        hidden = torch.tanh(x @ weights[0].T + model[0].bias)
        torch.testing.assert_close(y, hidden @ weights[1].T + model[2].bias)
    assert len(addresses) == 1
    masked.clear()
    assert not masked._lent


def test_what_a_mask_leaves_out_leaves():
    layer = sk.SparseLinear(8, 8, block_size=4, blocks=3, capacity=5, seed=0)
    candidates = {"fc": Candidates(layer, "block")}
    masked = MaskedLayers(candidates, Budget(candidates, None, "global", None, 0.0, "sort"))
    move = masked.leaving("fc", torch.tensor([True, False, True]))
    assert (move.slots.tolist(), move.row.tolist(), move.col.tolist()) == ([1], [-1], [-1])


@pytest.mark.parametrize("every", [False, True])
def test_passes_under_masks_by_hand(every):
    """One block a row: the loss is the sum of the values that a mask holds."""
    layer = sk.SparseLinear(1, 2, bias=False, block_size=1, sparsity=0, dtype=torch.float64)
    with torch.no_grad():
        layer.values.copy_(torch.tensor([3.0, 5.0]).view(2, 1, 1))
    candidates = {"fc": Candidates(layer, "block")}
    masked = MaskedLayers(candidates, Budget(candidates, None, "global", None, 0.0, "sort"))
    masks, x = torch.tensor([[True, False], [True, True], [False, False]]), torch.ones(1, 1, dtype=torch.float64)
    losses = masked_passes(layer, masked, masks, lambda: layer(x).sum(), every, None)
    assert losses.tolist() == [3, 8, 0] and not losses.requires_grad
    wanted = torch.tensor([2 / 3, 1 / 3] if every else [1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(layer.values.grad.flatten(), wanted)
