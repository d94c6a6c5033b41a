"""Arming and reading probes: micro-batches, gradient scaling, late calls, resumption, torch.compile."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import sparsekern as sk
from sparsekern.training import GradientMethod
from sparsekern.training.growth.gradient import is_finite
from tests.saved import through_a_file
from tests.training.test_base import bits, equal

METHODS = {
    "RigL": (sk.RigL, {"scoring": "exact"}),
    "RigL, screened": (sk.RigL, {"scoring": "screen", "shortlist": 2.0}),
    "GSE": (sk.GSE, {}),
    "GSE, global": (sk.GSE, {"scope": "global"}),
    "GSE, sketched": (sk.GSE, {"score_sketches": 3}),
    "GraBo": (sk.GSE, {"distribution": "grabo"}),
    "GraEst": (sk.GSE, {"distribution": "graest"}),
}
LINEAR = [name for name in METHODS if name not in ("RigL", "GraEst")]
"""Whose answers add up over micro-batches, and are the same however a batch is cut.

GraEst's add up, too, but each part has signs of its own: estimates of one gradient, in tests/ops/test_marginals.py.
"""


def make(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 6)).double()
    return sk.sparsify_(model, 0.6, (4, 2), seed=seed)


def batch(step: int, size: int = 8) -> torch.Tensor:
    return torch.randn(size, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def build(name: str, model: nn.Module, update_every: int = 4, **more) -> tuple[torch.optim.Optimizer, GradientMethod]:
    kind, options = METHODS[name]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return optimizer, kind(model, optimizer, update_every=update_every, **options | more)


def train(model, optimizer, method, steps, parts: int = 1, scaler=None) -> list[bool]:
    moved = []
    for step in steps:
        for part in batch(step).chunk(parts):
            loss = model(part).square().mean() / parts
            (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
        moved.append(method.step())
    return moved


def places(model: nn.Module) -> list[list[int]]:
    return [layer.topology.keys().tolist() for layer in sk.sparse_layers(model).values()]


def armed(model: nn.Module) -> list[bool]:
    return [layer.probe is not None for layer in sk.sparse_layers(model).values()]


@pytest.mark.parametrize("name", METHODS)
def test_probes_are_armed_for_the_steps_before_an_update_and_no_others(name):
    model = make()
    optimizer, method = build(name, model)
    stages = method.stages()
    for step in range(1, 10):
        assert armed(model) == [(step - 1) % 4 >= 4 - stages] * 3, f"during step {step}"
        assert train(model, optimizer, method, [step]) == [step % 4 == 0]
        for layer in sk.sparse_layers(model).values():
            layer.topology.validate()


@pytest.mark.parametrize("name", METHODS)
def test_updates_as_often_as_the_stages_allow(name):
    model = make()
    optimizer, method = build(name, model, update_every=1)
    assert train(model, optimizer, method, range(6)) == [step % method.stages() == 0 for step in range(1, 7)]


@pytest.mark.parametrize("name", METHODS)
def test_nothing_is_armed_after_the_last_update(name):
    model = make()
    optimizer, method = build(name, model, stop=9, drop_fraction=lambda step: 0.5)
    train(model, optimizer, method, range(8))
    assert not any(armed(model)) and method.updates == 2
    assert not any(train(model, optimizer, method, range(8, 30)))


@pytest.mark.parametrize("name", METHODS)
def test_what_moves(name):
    """Dropped and grown places are disjoint, counts stay, grown values and state are zero, the rest is untouched."""
    model = make()
    optimizer, method = build(name, model)
    train(model, optimizer, method, range(3))
    layer = model[2]
    model(batch(3)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    momentum = optimizer.state[layer.values]["momentum_buffer"]
    before = [t.clone() for t in (layer.row, layer.col, layer.values.detach(), momentum)]
    keys = layer.topology.keys()
    assert method.step()
    moved = (layer.row != before[0]) | (layer.col != before[1])
    assert moved.any() and not torch.isin(layer.topology.keys()[moved], keys).any()
    assert layer.topology.blocks() == keys.numel() if method.scope == "layer" else True
    assert not layer.values[moved].any() and not momentum[moved].any()
    assert torch.equal(layer.values[~moved], before[2][~moved]) and torch.equal(momentum[~moved], before[3][~moved])


@pytest.mark.parametrize("name", LINEAR)
def test_micro_batches_are_one_large_batch(name):
    one, many = make(), make()
    train(one, *build(name, one), range(12))
    train(many, *build(name, many), range(12), parts=4)
    assert places(one) == places(many) and places(one) != places(make())


@pytest.mark.parametrize("name", METHODS)
def test_gradient_scaling_changes_no_choice(name):
    plain, scaled = make(), make()
    train(plain, *build(name, plain), range(12))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    train(scaled, *build(name, scaled), range(12), scaler=scaler)
    assert places(plain) == places(scaled) and places(plain) != places(make())


@pytest.mark.parametrize("overflow", ["everywhere", "in the last layer only"])
@pytest.mark.parametrize("zero_first", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_a_skipped_step_leaves_no_trace(name, zero_first, overflow):
    """In each armed step of the first update a batch overflows, of which one layer's probe need not notice anything."""
    plain, skipping = make(), make()
    train(plain, *build(name, plain), range(5))
    optimizer, method = build(name, skipping)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for step in range(5):
        if any(armed(skipping)):
            before = bits(skipping)
            loss = skipping(batch(99)).square().mean() * (float("inf") if overflow == "everywhere" else 1)
            scaler.scale(loss).backward()
            skipping[4].bias.grad.fill_(float("inf"))
            scaler.step(optimizer)
            scaler.update()
            if zero_first:
                optimizer.zero_grad()
            assert method.step() is False and equal(before, bits(skipping))
            optimizer.zero_grad()
        train(skipping, optimizer, method, [step], scaler=scaler)
    assert method.updates == 1 and places(plain) == places(skipping)


def test_answers_that_are_not_finite_are_asked_for_again():
    model = make()
    optimizer, method = build("GSE", model)
    train(model, optimizer, method, range(3))
    model(batch(3)).square().mean().backward()
    model[0].probe.tensor.grad[0, 0, 0] = float("nan")
    optimizer.step()
    optimizer.zero_grad()
    assert method.step() is False and all(armed(model)) and method.updates == 0
    assert train(model, optimizer, method, [4]) == [True]


@pytest.mark.parametrize("name", METHODS)
def test_an_update_that_was_missed_is_made_up_for(name):
    """step() was not called for a while: the scores are asked for then."""
    model = make()
    optimizer, method = build(name, model, update_every=3)
    for step in range(4):
        model(batch(step)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert method.step() is False and method.updates == 0 and all(armed(model))
    moved = train(model, optimizer, method, range(4, 4 + method.stages()))
    assert moved == [False] * (method.stages() - 1) + [True]


@pytest.mark.parametrize("name", METHODS)
def test_a_layer_that_took_no_part_stays(name):
    model = make()
    idle = sk.SparseLinear(16, 16, block_size=4, sparsity=0.5, dtype=torch.float64, seed=0, name="idle")
    both = nn.ModuleDict({"net": model, "idle": idle})
    optimizer = torch.optim.SGD(both.parameters(), lr=0.1)
    method = METHODS[name][0](both, optimizer, update_every=2, **METHODS[name][1])
    before = idle.topology.keys().clone()
    train(model, optimizer, method, range(6))
    assert method.updates == 3 and method.metrics()["churn/net.0"] > 0
    if method.scope == "layer":
        assert torch.equal(before, idle.topology.keys())


@pytest.mark.parametrize("at", [7, 8, "in the middle of an armed step"])
@pytest.mark.parametrize("name", METHODS)
def test_killed_and_resumed_bit_for_bit(name, at):
    """Update every 4 steps: at 7 a probe is armed; and once more after one of its two micro-batches."""
    parts = 1 if name == "RigL" else 2
    through = make()
    train(through, *build(name, through), range(14), parts)

    first = make()
    optimizer, method = build(name, first)
    middle = isinstance(at, str)
    train(first, optimizer, method, range(7 if middle else at), parts)
    loose: list[torch.Tensor] = []
    if middle:
        for part in batch(7).chunk(parts)[: parts - 1]:
            (first(part).square().mean() / parts).backward()
        loose = [None if p.grad is None else p.grad.clone() for p in first.parameters()]
    saved = through_a_file((first, optimizer, method))

    second = make(1)
    optimizer, method = build(name, second, seed=0)
    for part, loaded in zip((method, second, optimizer), [saved[2], *saved[:2]], strict=True):
        part.load_state_dict(loaded)
    start = at
    if middle:
        for p, gradient in zip(second.parameters(), loose, strict=True):
            p.grad = gradient
        (second(batch(7).chunk(parts)[-1]).square().mean() / parts).backward()
        optimizer.step()
        optimizer.zero_grad()
        method.step()
        start = 8
    train(second, optimizer, method, range(start, 14), parts)
    assert equal(bits(second), bits(through)) and method.updates == 3


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("GSE, global", "GSE, sketched")])
def test_at_most_two_graphs_or_one_more_for_a_second_stage(name):
    """Shapes stay while the drop fraction falls and the topology moves. All of GSE's scopes compile to one probe."""
    torch._dynamo.reset()
    model = make()
    optimizer, method = build(name, model, update_every=3, stop=30)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    train(compiled, optimizer, method, range(20))
    assert method.updates == 6 and counter.frame_count == 1 + method.stages()

    plain = make()
    train(plain, *build(name, plain, update_every=3, stop=30), range(20))
    assert places(plain) == places(model)


def test_a_copy_is_not_armed():
    model = make()
    _, method = build("GSE", model, update_every=1)
    assert all(armed(model)) and not any(armed(copy.deepcopy(model))) and all(armed(model))
    assert method.updates == 0


def test_score_tokens_scores_on_some_tokens_of_each_backward():
    model = make()
    _, method = build("GSE", model, update_every=1, score_tokens=3)
    assert all(layer.probe.tokens == 3 for layer in method.layers.values())


def test_score_sketches_estimate_squared_norms():
    """Their mean over draws, within five standard deviations; blocks of no more elements are scored exactly."""
    model, draws = make(), 400
    gradients = torch.randn(3, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gradients[1] = 0
    exact = gradients.square().sum((1, 2))
    for sketches in (2, 8):
        _, method = build("GSE", model, update_every=1, score_sketches=sketches)
        method._keys["0"] = torch.arange(3)  # of which the probe asked; the last rows of an answer are padding
        scores = []
        for method.steps in range(draws):
            scores.append(method._over_ranks("0", torch.cat([gradients, torch.ones(2, 4, 2)])))
        squares = torch.stack(scores).square()
        if sketches == 8:
            torch.testing.assert_close(squares, exact.expand(draws, 3))
        else:
            assert squares[:, 0].unique().numel() > 100
            assert ((squares.mean(0) - exact).abs() <= 5 * exact * (2 / sketches / draws) ** 0.5).all()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_is_finite(wrong):
    assert is_finite(torch.empty(0)) and is_finite(torch.tensor([3e38, -3e38]))
    assert not is_finite(torch.tensor([[1.0, wrong], [2.0, 3.0]]))


class TestErrors:
    def test_update_needs_scores(self):
        _, method = build("RigL", make())
        with pytest.raises(RuntimeError, match=r"RigL has no scores to update by.*call step\(\) after every"):
            method.update()

    @pytest.mark.parametrize("stub", ["stages", "ask", "hear"])
    def test_what_a_subclass_says(self, stub):
        model = make()
        method = GradientMethod(model, torch.optim.SGD(model.parameters()))
        arguments = {"stages": (), "ask": (0, "0", model[0]), "hear": (0, {})}[stub]
        with pytest.raises(NotImplementedError):
            getattr(method, stub)(*arguments)
