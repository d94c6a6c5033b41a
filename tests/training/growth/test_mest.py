"""MEST on hand-worked 4x4 grids: importance by values and gradients, and growth before or after the drop."""

from __future__ import annotations

import copy
import logging

import pytest
import torch

import sparsekern as sk
from sparsekern.nn import sharded
from sparsekern.topology import check_tied
from tests.training.grids import NORMS, F, G, advance, changed, free, grid_layer, over, step
from tests.training.test_base import batch, built, check_resumed, make, train

# norms of the blocks, by slot         norms of their gradients, g_J * f_I      importance with half the gradient
#     9:0  .   1:1  .                      4   .   2   .                           11   .   2   .
#     .   2:2  .    .                      .   7   .   .                           .   5.5  .   .
#     .    .   .   8:3                     .   .   .   3                           .    .   .  9.5
#    3:4   .   .   4:5                    16   .   .   4                           11   .   .   6
IMPORTANCE = [11.0, 2.0, 5.5, 9.5, 11.0, 6.0]


def mest(model, **options) -> sk.MEST:
    return over(model, sk.MEST, **options)


def gradient_of(layer: sk.SparseLinear, slots: list[int]) -> list[float]:
    return [G[int(layer.row[slot])] * F[int(layer.col[slot])] for slot in slots]


@pytest.mark.parametrize("block", [1, 2])
def test_two_updates_by_hand(block):
    layer = grid_layer(block)
    method = mest(layer, drop_fraction=lambda step: 0.5)
    before = layer.topology.keys().clone()
    moved = changed(layer, lambda: step(layer, method))
    assert moved == [1, 2, 5], "2, 5.5 and 6; SET would take norms 1, 2 and 3"
    assert not layer.values[moved].any() and not set(layer.topology.keys()[moved].tolist()) & set(before.tolist())
    # The new ones are 0, with half of their gradients' norms, 7 at most: below 9.5. Of all six half go again.
    assert changed(layer, lambda: step(layer, method)) == [1, 2, 5] and method.updates == 2
    assert layer.topology.blocks() == 6 and layer.values[0, 0, 0] == 9 / block


@pytest.mark.parametrize("block", [1, 2])
def test_the_soft_bound_by_hand(block):
    """Two free slots: two grow; the two least important of eight go and two grow; the last update drops two."""
    layer = grid_layer(block, capacity=8)
    method = mest(layer, soft_bound=True, drop_fraction=0.34, anneal="constant", stop=4)
    before = layer.topology.keys().clone()
    assert step(layer, method)
    assert layer.topology.blocks() == 8 and torch.equal(layer.topology.keys()[:6], before[:6])
    importance = IMPORTANCE + [g / 2 for g in gradient_of(layer, [6, 7])]
    weakest = sorted(sorted(range(8), key=lambda slot: importance[slot])[:2])
    assert changed(layer, lambda: step(layer, method)) == weakest and 1 in weakest
    assert layer.topology.blocks() == 8
    importance = [0 if slot in weakest else number for slot, number in enumerate(importance)]
    importance = [
        number + g / 2 * (slot in weakest)
        for (slot, number), g in zip(enumerate(importance), gradient_of(layer, list(range(8))), strict=True)
    ]
    weakest = sorted(sorted(range(8), key=lambda slot: importance[slot])[:2])
    assert step(layer, method)
    assert free(layer) == weakest and method.metrics()["sparsity/"] == 10 / 16
    assert not step(layer, method)


def test_the_fraction_falls_in_steps():
    """A fifth of the blocks, which is 2 % of the weights at 90 %, until 90 of 120 epochs, and then half of that."""
    method = mest(make(), stop=120)
    assert [method.schedule.fraction(step) for step in (0, 89, 90, 119)] == [0.2, 0.2, 0.1, 0.1]
    assert mest(make()).schedule.fraction(10**6) == 0.2


def test_a_layer_without_a_gradient_goes_by_its_norms():
    layer = grid_layer(2)
    method = mest(layer, drop_fraction=lambda step: 0.5)
    assert changed(layer, lambda: advance(method)) == [1, 2, 4]


def test_an_update_by_hand_takes_the_gradient_that_is_there():
    layer = grid_layer(2)
    method = mest(layer, update_every=100, drop_fraction=lambda step: 0.5)
    layer.values.grad = torch.zeros_like(layer.values)
    layer.values.grad[1] = 100
    assert changed(layer, method.update) == [2, 4, 5]


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_those_that_the_optimizer_takes(fused):
    """Not scaled; and none of a step that gradient scaling skipped."""
    layer = grid_layer(2)
    method = sk.MEST(layer, torch.optim.SGD(layer.parameters(), lr=0.0, fused=fused), update_every=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for factor in (float("inf"), 1.0):
        method.optimizer.zero_grad()
        scaler.scale(layer(torch.ones(1, 8)).sum() * factor).backward()
        scaler.step(method.optimizer)
        scaler.update()
        assert method.steps == (factor == 1) and bool(method._importance) == (factor == 1)
    torch.testing.assert_close(method._importance[""], NORMS + 0.5 * 2.0)


def test_tied_taps_move_together():
    conv = sk.SparseConv2d(8, 8, 3, block_size=4, sparsity=0.5, tie_taps=True, capacity=27, seed=0)
    method = mest(conv, soft_bound=True, stop=4, drop_fraction=0.5, anneal="constant")
    blocks = []
    for _ in range(3):
        conv(torch.randn(2, 8, 4, 4)).square().mean().backward()
        assert advance(method)
        check_tied(conv.topology)
        blocks.append(conv.topology.blocks())
    assert blocks == [27, 27, 18]


@pytest.mark.parametrize("between", [False, True])
def test_saved_loaded_and_continued_bit_for_bit(between):
    """Also between the optimizer's step and the update, which needs the gradients of that step."""

    def go_on(model, optimizer, method, steps):
        if between and steps.start == 5:
            assert method._importance.keys() == {"0", "2", "4"} and method.step()
            steps = steps[1:]
        train(model, optimizer, method, steps)
        assert not method._importance
        if between and steps.stop == 5:
            method.backward(lambda: model(batch(5)).square().mean())
            optimizer.step()
            optimizer.zero_grad()

    check_resumed(lambda seed: built(sk.MEST, seed, update_every=3, drop_fraction=0.5), 5, 7, go_on)


def test_compacted_between_a_step_and_its_update():
    def run(compact: bool):
        torch.manual_seed(0)
        model = sk.sparsify_(torch.nn.Sequential(torch.nn.Linear(8, 8)), 0.5, 2, capacity=1.5, seed=0)
        method = mest(model, drop_fraction=lambda step: 0.5)
        model(batch(0)).square().mean().backward()
        method.optimizer.step()
        if compact:
            sk.compact_(model, method.optimizer)
        assert method.step() and model[0].topology.slots == (8 if compact else 12)
        return model[0].topology.sorted_keys()

    assert torch.equal(run(False), run(True))


def test_what_is_refused(caplog):
    for options, text in (
        ({"gradient_weight": -0.1}, "gradient_weight is -0.1; it must be 0 or more"),
        ({"soft_bound": True}, "stop is None, but with soft_bound the last update"),
        ({"anneal": "steps", "drop_fraction": lambda step: 0.1}, "anneal is 'steps', which has no effect where drop"),
        ({"drop": "signs"}, "drop is no option of MEST"),
        ({"grown_values": "random"}, "grown_values is no option of MEST"),
    ):
        with pytest.raises(ValueError, match=text) as raised:
            mest(make(), **options)
        assert raised.value.parameter == next(iter(options)).replace("soft_bound", "stop")
    with caplog.at_level(logging.WARNING):
        mest(make(), soft_bound=True, stop=4)
    assert "soft_bound is True, but no layer has a free slot" in caplog.text


def test_a_soft_bound_without_a_free_slot_drops_before_it_grows():
    layer, hard = grid_layer(2), grid_layer(2)
    soft, usual = (mest(x, drop_fraction=lambda _: 0.5, stop=4, soft_bound=x is layer) for x in (layer, hard))
    assert step(layer, soft) and step(hard, usual)
    assert torch.equal(layer.topology.keys(), hard.topology.keys()) and not torch.equal(layer.row, grid_layer(2).row)


def test_ranks_gather_one_number_a_slot_for_an_update(monkeypatch):
    gathered, joined = [], sharded.joined
    monkeypatch.setattr(sharded, "joined", lambda *a: gathered.append(1) or joined(*a))
    train(*built(sk.MEST, update_every=3, drop_fraction=0.5), range(6))
    assert len(gathered) == 2 * 3, "of 2 updates of 3 layers"


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_named(number):
    layer = grid_layer(2)
    method = mest(layer)
    before = layer.row.clone()
    layer.values.grad = torch.zeros_like(layer.values)
    layer.values.grad[1, 0, 0] = number
    for _ in range(2):
        with pytest.raises(ValueError, match="gradients or values of '' hold NaN or infinity at step 0"):
            method.update()
    assert torch.equal(layer.row, before) and method.updates == 0
    layer.values.grad.zero_()
    assert method.update()


def test_a_state_with_other_importance_is_refused():
    model = make()
    method = mest(model, update_every=3)
    state = copy.deepcopy(method.state_dict())
    for importance in (
        {"9": torch.zeros(4)},
        {"0": torch.zeros(5)},
        {"0": torch.zeros(4, dtype=torch.int32)},
        {"0": 1},
    ):
        with pytest.raises(ValueError, match=r"state\['importance'\]"):
            method.load_state_dict(state | {"importance": (importance,)})
    method.load_state_dict(state | {"importance": ({"0": torch.ones(4)},)})
    assert method._importance["0"].sum() == 4
