"""``sparsify_(..., only_if_faster=sample)``: what is raced, what wins, and that nothing else changes."""

from __future__ import annotations

import copy
import logging
from collections import Counter

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.analysis import Timing, layer_race
from sparsekern.nn import Choice
from tests.ranks import on_ranks

DENSE_MS = 2.0
SAMPLE = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def times(monkeypatch):
    """Milliseconds by contestant in place of a race; the number of races."""
    table: dict[object, float] = {"dense": DENSE_MS}
    races = Counter()

    def made_up(contestants, given, *_):
        races["all"] += 1
        for contestant in contestants.values():
            contestant.step_call(given)()
        return {key: Timing([table[key]]) for key in contestants}

    monkeypatch.setattr(layer_race, "race_steps", made_up)
    return table, races


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(32, 64), nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)]
    return nn.Sequential(*layers)


def snapshot(model: nn.Module) -> dict[str, object]:
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "modules": dict(model.named_modules()),
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": {name: list(module._forward_hooks) for name, module in model.named_modules()},
        "grads": {name: p.grad for name, p in model.named_parameters()},
        "random": torch.get_rng_state(),
    }


def assert_same(one: dict[str, object], other: dict[str, object]) -> None:
    for what in ("state", "random"):
        torch.testing.assert_close(one[what], other[what], rtol=0, atol=0)
    assert all(one[what] == other[what] for what in ("modules", "training", "hooks", "grads"))


def test_the_fastest_block_size_takes_the_place_of_a_layer(times, caplog):
    table, races = times
    table |= {(16, 16): 1.0, (8, 8): 0.5, (1, 1): 3.0}
    model, choices = network(), []
    caplog.set_level(logging.INFO, logger="sparsekern")
    same = sk.sparsify_(model, 0.75, [1, 8, (16, 16)], only_if_faster=SAMPLE, choices=choices)
    assert same is model and [layer.block_size for layer in sk.sparse_layers(model).values()] == 3 * [(8, 8)]
    assert [choice.name for choice in choices] == ["0", "3", "5"] and choices[0].dense_ms == DENSE_MS
    assert races["all"] == 2, "equal layers are raced once"
    assert "0: 8x8 blocks, 4.00x as fast as dense (0.5 of 2 ms)" in caplog.messages
    assert "3 of 3 layers are faster sparse" in caplog.messages


def test_layers_that_differ_by_a_block_are_raced_once_and_those_of_other_sparsities_apart(times):
    table, races = times
    table[16, 16] = table[8, 8] = 1.0
    alike = nn.Sequential(*(nn.Linear(128, 128) for _ in range(3)))
    raced = sk.sparsify_(copy.deepcopy(alike), 0.9, 8, only_if_faster=torch.randn(4, 128))
    assert len({layer.topology.slots for layer in sk.sparse_layers(raced).values()}) == 2
    assert races["all"] == 1
    sk.sparsify_(alike, {"0": 0.9, "*": 0.5}, 16, only_if_faster=torch.randn(4, 128))
    assert races["all"] == 3


def test_the_layers_are_those_of_a_call_without_a_race(times):
    times[0][16, 16] = 1.0
    raced = sk.sparsify_(network(), 0.75, 16, only_if_faster=SAMPLE, seed=3)
    plain = sk.sparsify_(network(), 0.75, 16, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(raced.state_dict().values(), plain.state_dict().values(), strict=True))


def test_a_model_whose_layers_are_all_faster_dense_is_left_as_it_was(times, caplog):
    times[0][16, 16], times[0][8, 8] = DENSE_MS, 5.0  # as fast as dense is not faster
    model, choices = network().train(), []
    model[2].eval()
    model(torch.randn(4, 32)).sum().backward()
    before = snapshot(model)
    caplog.set_level(logging.INFO, logger="sparsekern")
    sk.sparsify_(model, 0.75, [8, 16], only_if_faster=SAMPLE, choices=choices)
    assert_same(before, snapshot(model))
    assert all(choice.block is None for choice in choices)
    assert "0: stays dense (2 ms; 16x16 blocks: 2 ms)" in caplog.messages


def test_an_error_leaves_the_model_as_it_was(times, monkeypatch):
    model = network()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        sk.sparsify_(model, 0.75, 16, only_if_faster=SAMPLE[:, 1:])

    def breaks(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(layer_race, "race_steps", breaks)
    choices = []
    with pytest.raises(RuntimeError, match="out of memory"):
        sk.sparsify_(model, 0.75, 16, only_if_faster=SAMPLE, choices=choices)
    assert_same(before, snapshot(model))
    assert not choices


def test_a_busy_machine_is_said(monkeypatch, caplog):
    unsteady = {"dense": Timing([1.0, 1.0, 2.0, 3.0]), (16, 16): Timing([1.0])}
    monkeypatch.setattr(layer_race, "race_steps", lambda *_: unsteady.copy())
    sk.sparsify_(nn.Sequential(nn.Linear(32, 32)), 0.5, 16, only_if_faster=SAMPLE)
    (said,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert said.startswith("0: the quartiles of the dense layer are 50% of its median apart; the machine is too busy")


def test_hooks_and_gradients_of_the_model_know_nothing_of_the_race(times):
    times[0][16, 16] = 5.0
    model, seen = network(), []
    model[3].register_forward_hook(lambda *_: seen.append("forward"))
    model[3].weight.register_hook(lambda gradient: seen.append("gradient"))
    sk.sparsify_(model, 0.75, 16, only_if_faster=SAMPLE)
    assert seen == ["forward"]  # of the model's own run


def test_layers_that_the_sample_does_not_reach_stay_dense(times):
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x, *, scale):
            return self.used(x) * scale

    times[0][16, 16] = 1.0
    model, choices = Skips(), []
    sk.sparsify_(model, 0.5, 16, only_if_faster={"x": torch.randn(3, 32), "scale": 2.0}, choices=choices)
    assert list(sk.sparse_layers(model)) == ["used"]
    assert str(choices[1]) == "unused: stays dense (the sample does not reach it)"


def test_layers_are_raced_as_autocast_computes_them(times, monkeypatch):
    seen = []
    step_call = layer_race.Contestant.step_call

    def spy(self, given, dy=None):
        run = step_call(self, given, dy)
        seen.append((given.autocast, run()[0].dtype))
        return run

    monkeypatch.setattr(layer_race.Contestant, "step_call", spy)
    times[0][16, 16] = 1.0
    with torch.autocast("cpu", torch.bfloat16):
        sk.sparsify_(nn.Sequential(nn.Linear(32, 32)), 0.5, 16, only_if_faster=torch.randn(4, 32))
    assert seen == 2 * [(torch.bfloat16, torch.bfloat16)]


def test_convolutions_and_an_optimizer_in_use(times):
    times[0][16, 16] = 1.0
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3), nn.Flatten(), nn.Linear(512, 16))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sample = torch.randn(2, 3, 8, 8)
    model(sample).sum().backward()
    optimizer.step()
    sk.sparsify_(model, 0.5, 16, init="norm", optimizer=optimizer, only_if_faster=sample)
    assert list(sk.sparse_layers(model)) == ["1", "3"]
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"block_size": []}, "block_size is an empty list; give at least one size"),
        ({"choices": [], "only_if_faster": None}, "choices is given without only_if_faster"),
    ],
)
def test_nothing_to_race(options, said):
    with pytest.raises(ValueError, match=said):
        sk.sparsify_(network(), **{"only_if_faster": SAMPLE} | options)


def test_a_model_without_weights_cannot_be_raced():
    with torch.device("meta"):
        model = network()
    with pytest.raises(ValueError, match="only_if_faster is given, but the model is on the meta device"):
        sk.sparsify_(model, 0.75, 16, only_if_faster=SAMPLE)


def test_a_real_race(caplog):
    """Only that it runs: who is faster depends on the machine."""
    choices: list[Choice] = []
    model = network()
    sk.sparsify_(model, 0.75, [8, 16], only_if_faster=torch.randn(64, 32), choices=choices)
    assert len(sk.sparse_layers(model)) == sum(choice.block is not None for choice in choices)
    assert all(set(choice.milliseconds) == {(8, 8), (16, 16)} and choice.dense_ms > 0 for choice in choices)


def _choose(rank: int) -> list[float]:
    layer_race.race_steps = lambda contestants, *_: {key: Timing([(rank + 1) * 1.0]) for key in contestants}
    choices: list[Choice] = []
    model = sk.sparsify_(network(), 0.75, 16, only_if_faster=SAMPLE, choices=choices)
    return [choice.dense_ms for choice in choices] + [float(len(sk.sparse_layers(model)))]


def test_all_ranks_take_what_the_first_one_measured(tmp_path):
    assert on_ranks(_choose, 2, tmp_path) == 2 * [[1.0, 1.0, 1.0, 0.0]]
