"""The base class of all training methods."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.training import METHODS, Method, Move, NetworkSampler
from tests.saved import through_a_file


def make(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    return sk.sparsify_(model, 0.5, 4, seed=seed)


sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def batch(step: int) -> torch.Tensor:
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(step))


def train(model, optimizer, method, steps) -> list[bool]:
    moved = []
    for step in steps:
        method.backward(lambda step=step: model(batch(step)).square().mean())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        moved.append(method.step())
    return moved


def bits(model: nn.Module) -> list[torch.Tensor]:
    return list(copy.deepcopy(model.state_dict()).values())


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


Parts = tuple[nn.Module, torch.optim.Optimizer, Any]


def built(kind: type, seed: int = 0, optimizer: Callable[..., Any] = sgd, **options: Any) -> Parts:
    """A model, its optimizer and a method."""
    model = make(seed)
    made = optimizer(model.parameters())
    return model, made, kind(model, made, **options)


def numbers(parts: Parts) -> dict[str, float]:
    """The metrics of a method that every run repeats."""
    return {name: value for name, value in parts[2].metrics().items() if "seconds" not in name}


def check_resumed(build: Callable[[int], Parts], at: int, end: int, go_on: Callable[..., Any] = train) -> Parts:
    """Check that a run that is saved to a file, and loaded into parts of another seed, goes on bit for bit.

    Returns the parts of the run that went through.
    """
    through, first, second = build(0), build(0), build(1)
    go_on(*through, range(end))
    go_on(*first, range(at))
    saved = through_a_file(first)
    if getattr(second[2], "compact", False):
        assert sk.compact_(*second[:2], like=saved[0]) > 0
    for part, state in zip(second, saved, strict=True):
        part.load_state_dict(state)
    go_on(*second, range(at, end))
    assert equal(bits(second[0]), bits(through[0])) and numbers(second) == numbers(through)
    states = [parts[1].state_dict()["state"] for parts in (second, through)]
    for mine, other in zip(*(state.values() for state in states), strict=True):
        assert mine.keys() == other.keys()
        assert all(torch.equal(torch.as_tensor(mine[key]), torch.as_tensor(other[key])) for key in mine)
    return through


@pytest.mark.parametrize("name", METHODS)
def test_saved_loaded_and_continued_bit_for_bit(name):
    options = {"update_every": 3, "stop": 40}
    check_resumed(lambda seed: built(METHODS[name], seed, torch.optim.AdamW, **options), 10, 20)


def test_one_seed_one_run():
    def run(seed):
        parts = built(sk.SET, update_every=1, seed=seed)
        train(*parts, range(5))
        return bits(parts[0])

    assert equal(run(0), run(0)) and not equal(run(0), run(1))


def test_the_global_generator_is_not_read():
    parts = built(sk.SET, update_every=1)
    state = torch.get_rng_state()
    assert all(train(*parts, range(3)))
    assert torch.equal(state, torch.get_rng_state())


def test_step_returns_whether_blocks_moved_and_counts_optimizer_steps():
    model, optimizer, method = built(sk.SET, update_every=3, stop=10, drop_fraction=lambda step: 0.5)
    assert train(model, optimizer, method, range(12)) == [s % 3 == 0 and s < 10 for s in range(1, 13)]
    assert method.step() is False, "no optimizer step since the last call"
    assert method.steps == 12 and method.updates == 3


def test_gradient_accumulation_and_late_calls():
    model, optimizer, method = built(sk.SET, update_every=2)
    for micro in range(3):
        model(batch(micro)).sum().backward()
        assert method.step() is False
    for _ in range(3):  # the update that was due after step 2 is not lost
        optimizer.step()
    assert method.step() is True and method.updates == 1


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_scaling_skipped_does_not_count(fused):
    model, optimizer, method = built(sk.SET, 0, partial(torch.optim.AdamW, fused=fused), update_every=1)
    scaler = torch.amp.GradScaler("cpu")
    before = bits(model)
    method.backward(lambda: model(batch(0)).sum() * float("inf"), scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert method.step() is False and method.steps == 0
    assert equal(before, bits(model))
    optimizer.zero_grad()
    method.backward(lambda: model(batch(0)).sum(), scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert method.step() is True and method.steps == 1


def test_backward_returns_the_loss_detached_and_not_scaled():
    model, _, method = built(sk.Static)
    expected = model(batch(0)).square().mean()
    loss = method.backward(lambda: model(batch(0)).square().mean(), scaler=torch.amp.GradScaler("cpu"))
    assert torch.equal(loss, expected) and not loss.requires_grad
    assert model[0].values.grad is not None


def test_repr():
    _, _, method = built(sk.SET, update_every=5, stop=50)
    assert repr(method) == "SET(3 layers, update_every=5, start=0, stop=50, step 0, 0 updates)"


def test_frozen_layers_stay():
    model = make()
    model[2].values.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    method = sk.SET(model, optimizer, update_every=1)
    before = bits(model[2])
    train(model, optimizer, method, range(3))
    assert torch.equal(before[0], model[2].values) and method.metrics()["churn/2"] == 0
    assert method.metrics()["churn/0"] > 0


def test_sparsity_never_changes_and_metrics_are_plain_floats():
    model, optimizer, method = built(sk.SET, 0, torch.optim.Adam, update_every=1, drop_fraction=0.25)
    assert method.metrics()["kept/2"] == 1
    sparsity = {k: v for k, v in method.metrics().items() if k.startswith("sparsity")}
    train(model, optimizer, method, range(5))
    metrics = method.metrics()
    assert {k: metrics[k] for k in sparsity} == sparsity
    assert sparsity["sparsity/global"] == 0.5 and sparsity["sparsity/4"] == 0.5
    assert metrics["churn/2"] == 0.25 and 0 < metrics["kept/2"] < 1
    assert metrics["steps"] == metrics["updates"] == 5 and metrics["update_seconds"] > 0
    assert all(type(v) in (int, float) for v in metrics.values())


def test_a_failed_check_moves_nothing():
    """An optimizer that cannot follow is found before the first layer moves."""
    model, optimizer, method = built(sk.SET, update_every=1)
    model(batch(0)).sum().backward()
    optimizer.step()
    optimizer.state[model[4].values]["flat"] = torch.zeros(3)
    before = bits(model)
    with pytest.raises(ValueError, match=r"SGD keeps 'flat' for values of '4', of shape \(3,\)"):
        method.step()
    assert equal(before, bits(model))


def test_an_illegal_move_of_one_layer_moves_none():
    class Wrong(Method):
        def choose(self, name, layer, fraction, generator):
            row = torch.tensor([-1 if name == "0" else 99], dtype=torch.int32)
            return Move(torch.tensor([0]), row, row)

    model, _, method = built(Wrong)
    before = bits(model)
    with pytest.raises(ValueError, match="row is 99 for slot 0"):
        method.update()
    assert equal(before, bits(model))


def test_nothing_moves_at_stop_or_later_however_late_the_call():
    model, optimizer, method = built(sk.SET, update_every=10, stop=15, drop_fraction=lambda step: 0.5)
    model(batch(0)).sum().backward()
    for _ in range(20):
        optimizer.step()
    assert method.step() is False


def test_a_layer_without_blocks_has_metrics():
    layer = sk.SparseLinear(8, 8, block_size=4, blocks=1)
    free = torch.tensor([-1], dtype=torch.int32)
    layer.move_(torch.tensor([0]), free, free)
    method = sk.SET(layer, torch.optim.SGD(layer.parameters()))
    assert method.update() is False
    assert method.metrics()["sparsity/global"] == 1


def test_a_method_is_one_function():
    """What a newcomer writes: here, every block swaps to the other end of the grid if that is free."""

    class Mirror(Method):
        def choose(self, name, layer, fraction, generator):
            grid = layer.grid
            row, col = grid.rows - 1 - layer.row, grid.cols - 1 - layer.col
            free = ~torch.isin(row * grid.cols + col, layer.topology.keys())
            slots = free.nonzero().squeeze(1)
            return Move(slots, row[slots], col[slots])

    layer = sk.SparseLinear(8, 8, block_size=2, blocks=5, seed=0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    method = Mirror(layer, optimizer, update_every=1)
    layer(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    assert method.step()
    layer.topology.validate()


class TestErrors:
    def test_sharded_values(self, monkeypatch):
        model = make()
        optimizer = torch.optim.SGD(model.parameters())
        model[0].values.device_mesh = None
        with pytest.raises(NotImplementedError, match="values of '0' are a DTensor"):
            sk.SET(model, optimizer)

    def test_choose_is_for_subclasses(self):
        with pytest.raises(NotImplementedError):
            built(Method)[2].update()

    def test_a_state_that_lacks_all_entries(self):
        names = "born, churn, explored, method, seconds, seen, start, steps, updates"
        with pytest.raises(ValueError, match=f"the state lacks {names}"):
            built(sk.SET)[2].load_state_dict({"version": 2})


@pytest.mark.parametrize(
    ("kind", "option"),
    [
        *((sk.SET, name) for name in ("scope", "score_tokens", "updte_every")),
        *((kind, name) for kind in (sk.VRPGE, sk.TopKAST) for name in ("keep_connected", "min_age", "score_tokens")),
        *(
            (sk.Static, name)
            for name in ("drop_fraction", "anneal", "grown_state", "keep_connected", "min_age", "scope")
        ),
    ],
)
def test_an_option_without_effect_is_refused(kind, option):
    text = f"{option} is no option of {kind.__name__}, on which it would have no"
    with pytest.raises(ValueError, match=text) as raised:
        built(kind, **{option: 1})
    assert raised.value.parameter == option


@pytest.mark.parametrize("name", METHODS)
def test_choosing_changes_nothing(name):
    model, optimizer, method = built(METHODS[name], 0, torch.optim.AdamW, update_every=3, stop=40)
    if name == "vrpge":
        with torch.no_grad():
            method.probabilities._value[:9] = 0  # to be refilled
    chosen = []

    def update():
        before = bits(model), str(method.state_dict())
        chosen.extend(method.choose_all(0.5) for _ in range(2))
        assert equal(bits(model), before[0]) and str(method.state_dict()) == before[1]
        return False

    method.update = update
    train(model, optimizer, method, range(3))
    first, second = chosen
    assert first.keys() == second.keys() and bool(first) == (name != "static")
    assert all(torch.equal(a, b) for key in first for a, b in zip(first[key], second[key], strict=True))


def test_only_a_method_that_samples_networks_says_so():
    samplers = [kind for kind in METHODS.values() if isinstance(built(kind, stop=400)[2], NetworkSampler)]
    assert samplers == [sk.VRPGE, sk.TopKAST]


REFUSED = [
    (sk.SET, {"drop": "sign"}, "drop is 'sign'; it must be one of norm, signs"),
    (sk.SET, {"grown_values": "zeros"}, "grown_values is 'zeros'; it must be one of zero, random"),
    (sk.SET, {"drop_fraction": -0.1}, "drop_fraction is -0.1"),
    (sk.SET, {"anneal": "linear"}, "anneal is 'linear'; it must be one of cosine, constant, steps"),
    (
        sk.SET,
        {"anneal": "constant", "drop_fraction": lambda step: 0.1},
        "anneal is 'constant', which has no effect where drop_fraction is a function",
    ),
    (sk.SET, {"offset": -1}, "offset is -1; it must be 0 or more optimizer steps"),
    (sk.GSE, {"distribution": "grab"}, "distribution is 'grab'; it must be one of uniform, grabo, graest"),
    (sk.GSE, {"subset_factor": 0}, "subset_factor is 0; it must be a number above 0"),
    (sk.GSE, {"subset_factor": float("inf")}, "subset_factor is inf"),
    (sk.GSE, {"score_tokens": 0}, "score_tokens is 0; it must be 1 or more"),
    (sk.GSE, {"score_tokens": -1}, "score_tokens is -1; it must be 1 or more"),
    (sk.GSE, {"score_sketches": 0}, "score_sketches is 0; it must be 1 or more"),
    (sk.RigL, {"scoring": "best"}, "scoring is 'best'; it must be one of auto, exact, screen"),
    (sk.RigL, {"sketches": 0}, "sketches is 0; it must be 1 or more"),
    (sk.RigL, {"shortlist": 0.5}, "shortlist is 0.5; it must be 1 or more"),
    (sk.RigL, {"shortlist": float("nan")}, "shortlist is nan"),
    (sk.RigL, {"regrow": True, "scope": "global"}, "regrow is for scope='layer'"),
    (sk.RigL, {"regrow": True, "scoring": "screen"}, "regrow needs the scores of all blocks"),
    (sk.RigL, {"scope": "model"}, "scope is 'model'; it must be one of layer, global"),
    (sk.VRPGE, {"masks": 1}, "masks is 1; it must be 2 or more"),
    (sk.VRPGE, {"structure_every": 0}, "structure_every is 0; it must be 1 or more"),
    (sk.VRPGE, {"scope": "head"}, "scope is 'head'; it must be one of layer, global"),
    (sk.VRPGE, {"projection": "newton"}, "projection is 'newton'; it must be one of sort, bisection"),
    (sk.VRPGE, {"weight_step": "two"}, "weight_step is 'two'; it must be one of one, all"),
    (sk.VRPGE, {"unsampled": "zero"}, "unsampled is 'zero'; it must be one of lazy, decay"),
    (sk.VRPGE, {"refill": 2.0}, "refill is 2.0; it must be a probability"),
    (sk.VRPGE, {"refill": 0.1, "group": "row"}, "refill is 0.1, which has no effect with group='row'"),
    (sk.AGENT, {"gamma": 1.1}, r"gamma is 1.1; it must be a number in \[0, 1\]"),
    (sk.AGENT, {"alpha": 0}, r"alpha is 0; it must be a number in \(0, 1\]"),
    (sk.AGENT, {"estimate": "guess"}, "estimate is 'guess'; it must be one of losses, gradients"),
    (sk.AGENT, {"scope": "head"}, "scope is 'head'; it must be one of global, layer"),
    (sk.AGENT, {"batches": 0}, "batches is 0; it must be 1 or more"),
    (sk.AGENT, {"every": 0, "estimate": "gradients"}, "every is 0; it must be 1 or more"),
    (
        sk.AGENT,
        {"every": 5},
        "every is 5, but the losses of batches give one c after a pass; estimate must be",
    ),
    (sk.AGENT, {"scope": "layer"}, "scope is 'layer', but the losses"),
]


@pytest.mark.parametrize(("kind", "options", "text"), REFUSED)
def test_values_out_of_range_are_named(kind, options, text):
    with pytest.raises(ValueError, match=text):
        built(kind, **options)


def arguments(kind: type) -> list[str]:
    """Return the names of a constructor's arguments, and of those it hands the rest to, that are no yes or no."""
    signatures = [inspect.signature(cls.__init__).parameters for cls in kind.__mro__ if "__init__" in vars(cls)][:-1]
    kinds = {name: p.annotation for parameters in signatures for name, p in parameters.items()}
    known = {"self", "args", "kwargs", "model", "optimizer", "options", "others", "process_group", *kind.unused_options}
    return sorted(name for name, annotation in kinds.items() if name not in known and annotation != "bool")


@pytest.mark.parametrize(
    ("method", "name"), [(method, name) for method, kind in METHODS.items() for name in arguments(kind)]
)
def test_arguments_of_a_wrong_type_are_named(method, name):
    """An error of Python or torch from three calls deeper would not say which argument it was."""
    model = sk.sparsify_(nn.Sequential(nn.Linear(16, 16)), 0.5, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for value in ("x", [1], object()):
        with pytest.raises((TypeError, ValueError), match=rf"^{name} (is|of)\b.*(must be|are)"):
            METHODS[method](model, optimizer, **{name: value})
