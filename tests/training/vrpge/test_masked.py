"""Layers that compute with some of their units."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.topology import to_dense
from sparsekern.training.vrpge.budget import Budget, Candidates
from sparsekern.training.vrpge.masks import MaskedLayers, PartialStep, masked_passes


def test_all_layers_compute_with_the_units_of_a_mask_in_the_same_tensors():
    model = sk.sparsify_(nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8)), 0.25, 4, seed=0)
    candidates = {name: Candidates(layer, "row") for name, layer in sk.sparse_layers(model).items()}
    budget = Budget(candidates, None, "global", None, 0.0, "sort")
    masked = MaskedLayers(budget)
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
    masked = MaskedLayers(Budget(candidates, None, "global", None, 0.0, "sort"))
    move = masked.leaving("fc", torch.tensor([True, False, True]))
    assert (move.slots.tolist(), move.row.tolist(), move.col.tolist()) == ([1], [-1], [-1])


@pytest.mark.parametrize("every", [False, True])
def test_passes_under_masks_by_hand(every):
    """One block a row: the loss is the sum of the values that a mask holds."""
    layer = sk.SparseLinear(1, 2, bias=False, block_size=1, sparsity=0, dtype=torch.float64)
    with torch.no_grad():
        layer.values.copy_(torch.tensor([3.0, 5.0]).view(2, 1, 1))
    candidates = {"fc": Candidates(layer, "block")}
    masked = MaskedLayers(Budget(candidates, None, "global", None, 0.0, "sort"))
    masks, x = torch.tensor([[True, False], [True, True], [False, False]]), torch.ones(1, 1, dtype=torch.float64)
    losses = masked_passes(layer, masked, masks, lambda: layer(x).sum(), every, None)
    assert losses.tolist() == [3, 8, 0] and not losses.requires_grad
    wanted = torch.tensor([2 / 3, 1 / 3] if every else [1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(layer.values.grad.flatten(), wanted)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True, foreach=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.5),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.5),
}


def values() -> nn.Parameter:
    return nn.Parameter(torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(0)))


def gradient(step: int) -> torch.Tensor:
    return torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(10 + step))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_slot_is_as_if_it_had_only_its_own_steps(name):
    """Chosen always: as ordinary training. Chosen never: as it was, state included. In between: waits."""
    parameter, ordinary = values(), values()
    start = parameter.detach().clone()
    optimizer, plain = OPTIMIZERS[name]([parameter]), OPTIMIZERS[name]([ordinary])
    partial_step = PartialStep(optimizer)
    address = parameter.data_ptr()
    for step in range(4):
        parameter.grad, ordinary.grad = gradient(step), gradient(step)
        kept = copy.deepcopy(dict(optimizer.state.get(parameter, {})))
        chosen = torch.tensor([0, 1, 4] if step % 2 else [0, 4])
        partial_step.begin("layer", parameter, chosen)
        optimizer.step()
        partial_step.end()
        plain.step()
        assert torch.equal(parameter.grad, gradient(step))
        for key, before in kept.items():
            if isinstance(before, torch.Tensor) and before.dim():
                assert torch.equal(optimizer.state[parameter][key][[2, 3, 5]], before[[2, 3, 5]]), key
    torch.testing.assert_close(parameter[[0, 4]], ordinary[[0, 4]], rtol=1e-6, atol=1e-7)
    assert torch.equal(parameter[[2, 3, 5]], start[[2, 3, 5]]) and not torch.equal(parameter[1], start[1])
    assert parameter.data_ptr() == address and optimizer.param_groups[0]["params"][0] is parameter
    assert list(optimizer.state) == [parameter]
    for key, state in plain.state[ordinary].items():
        if isinstance(state, torch.Tensor):
            assert optimizer.state[parameter][key].shape == state.shape, key


def test_no_slot_at_all():
    parameter = values()
    optimizer = OPTIMIZERS["adamw"]([parameter])
    partial_step = PartialStep(optimizer)
    parameter.grad = gradient(0)
    partial_step.begin("layer", parameter, torch.zeros(0, dtype=torch.int64))
    optimizer.step()
    partial_step.end()
    assert torch.equal(parameter, values()) and not optimizer.state[parameter]["exp_avg"].any()


def test_without_a_gradient_nothing_happens():
    parameter = values()
    optimizer = OPTIMIZERS["sgd"]([parameter])
    PartialStep(optimizer).begin("layer", parameter, torch.tensor([0]))
    assert optimizer.param_groups[0]["params"][0] is parameter


def test_after_a_step_that_failed_the_parameter_is_back():
    parameter = values()
    optimizer = OPTIMIZERS["sgd"]([parameter])
    partial_step = PartialStep(optimizer)
    parameter.grad = gradient(0)
    partial_step.begin("layer", parameter, torch.tensor([0]))
    partial_step.end()
    assert optimizer.param_groups[0]["params"][0] is parameter and torch.equal(parameter, values())


def test_a_parameter_of_another_optimizer():
    layer = sk.SparseLinear(4, 4, block_size=2, sparsity=0)
    layer.values.grad = torch.zeros_like(layer.values)
    with pytest.raises(ValueError, match="values of 'fc' are not in this optimizer"):
        PartialStep(OPTIMIZERS["sgd"]([values()])).begin("fc", layer.values, torch.tensor([0]))
