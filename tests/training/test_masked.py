"""Layers that compute with some of their units."""

from __future__ import annotations

import torch
from torch import nn

import sparsekern as sk
from sparsekern.topology import to_dense
from sparsekern.training.budget import Budget
from sparsekern.training.candidates import Candidates
from sparsekern.training.masked import MaskedLayers


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
