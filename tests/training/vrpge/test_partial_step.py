"""Optimizers on some slots: the chosen ones as if they were alone, the others untouched to the bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.training.vrpge.partial_step import StandIns

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
    stand_ins = StandIns(optimizer)
    address = parameter.data_ptr()
    for step in range(4):
        parameter.grad, ordinary.grad = gradient(step), gradient(step)
        kept = copy.deepcopy(dict(optimizer.state.get(parameter, {})))
        chosen = torch.tensor([0, 1, 4] if step % 2 else [0, 4])
        stand_ins.enter("layer", parameter, chosen)
        optimizer.step()
        stand_ins.leave()
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
    stand_ins = StandIns(optimizer)
    parameter.grad = gradient(0)
    stand_ins.enter("layer", parameter, torch.zeros(0, dtype=torch.int64))
    optimizer.step()
    stand_ins.leave()
    assert torch.equal(parameter, values()) and not optimizer.state[parameter]["exp_avg"].any()


def test_without_a_gradient_nothing_happens():
    parameter = values()
    optimizer = OPTIMIZERS["sgd"]([parameter])
    StandIns(optimizer).enter("layer", parameter, torch.tensor([0]))
    assert optimizer.param_groups[0]["params"][0] is parameter


def test_after_a_step_that_failed_the_parameter_is_back():
    parameter = values()
    optimizer = OPTIMIZERS["sgd"]([parameter])
    stand_ins = StandIns(optimizer)
    parameter.grad = gradient(0)
    stand_ins.enter("layer", parameter, torch.tensor([0]))
    stand_ins.leave()
    assert optimizer.param_groups[0]["params"][0] is parameter and torch.equal(parameter, values())


def test_a_parameter_of_another_optimizer():
    layer = sk.SparseLinear(4, 4, block_size=2, sparsity=0)
    layer.values.grad = torch.zeros_like(layer.values)
    with pytest.raises(ValueError, match="values of 'fc' are not in this optimizer"):
        StandIns(OPTIMIZERS["sgd"]([values()])).enter("fc", layer.values, torch.tensor([0]))
