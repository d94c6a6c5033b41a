"""RigL and GSE grow where the gradient that the optimizer takes is largest: that of a dense twin, in many loops.

The learning rate is zero, so that the weights stay. With a shortlist or a subset of all empty places, every method has
to find the largest blocks of the twin's gradient.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import sparsekern as sk
from sparsekern.topology import generator_for, part_of
from tests.ranks import on_ranks

F64 = torch.float64
FRACTION = 0.4
METHODS = {
    "RigL": (sk.RigL, {"shortlist": 1e6}),
    "RigL, screened": (sk.RigL, {"scoring": "screen", "shortlist": 1e6}),
    "GSE": (sk.GSE, {"subset_factor": 1e6}),
}
Loss = Callable[[nn.Module, Tensor], Tensor]


def linear() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(18, 26), nn.Tanh(), nn.Linear(26, 18), nn.Softplus()).to(F64)
    return sk.sparsify_(model, 0.7, (4, 3), seed=0)


def conv() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 12, 3, stride=2, padding=1, groups=2),
        nn.Tanh(),
        nn.Conv2d(12, 6, 1),
        nn.Tanh(),
        nn.Conv2d(6, 6, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1)),
        nn.Tanh(),
        nn.Conv2d(6, 4, (2, 3), padding="same"),
    )
    return sk.sparsify_(model.to(F64), 0.7, (3, 2), seed=0, ignore=[])


MODELS = {"linear": (linear, (6, 18)), "conv": (conv, (4, 4, 9, 8))}


def batch(size: tuple[int, ...], *key: int | str) -> Tensor:
    return torch.randn(size, dtype=F64, generator=generator_for(*key)).requires_grad_()


def plain(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def other(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - 2).abs().sum()


def siamese(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - model(x.flip(0) + 0.1)).square().sum()


def penalty(model: nn.Module, x: Tensor) -> Tensor:
    (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return (g.square().sum(1) - 1).square().sum()


def one(loss: Loss) -> Callable[..., None]:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer, size: tuple[int, ...], at: int) -> None:
        loss(model, batch(size, at)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def accumulate(model: nn.Module, optimizer: torch.optim.Optimizer, size: tuple[int, ...], at: int) -> None:
    for part in range(3):
        plain(model, batch(size, at, part)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e9)  # writes into the gradients, and leaves them as they are
    optimizer.step()
    optimizer.zero_grad()


def zero_first(model: nn.Module, optimizer: torch.optim.Optimizer, size: tuple[int, ...], at: int) -> None:
    optimizer.zero_grad(set_to_none=False)
    plain(model, batch(size, at)).backward()
    optimizer.step()


def gan(set_to_none: bool, of_the_model: bool, parts: int = 1) -> Callable[..., None]:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer, size: tuple[int, ...], at: int) -> None:
        (10 * other(model, batch(size, at, "dropped"))).backward()
        (model if of_the_model else optimizer).zero_grad(set_to_none=set_to_none)
        for part in range(parts):
            plain(model, batch(size, at, part)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
        other(model, batch(size, at, "after the step")).backward()
        optimizer.zero_grad(set_to_none=set_to_none)

    return step


def sam(model: nn.Module, optimizer: torch.optim.Optimizer, size: tuple[int, ...], at: int) -> None:
    x = batch(size, at)
    plain(model, x).backward()
    away = [5 * p.grad * (p != 0) for p in model.parameters()]  # of the twin only what the layer stores
    with torch.no_grad():
        for p, d in zip(model.parameters(), away, strict=True):
            p.add_(d)
    optimizer.zero_grad()
    plain(model, x).backward()
    with torch.no_grad():
        for p, d in zip(model.parameters(), away, strict=True):
            p.sub_(d)
    optimizer.step()
    optimizer.zero_grad()


def closures(model: nn.Module, optimizer: torch.optim.Optimizer, size: tuple[int, ...], at: int) -> None:
    """An optimizer that evaluates its closure several times a step; the last evaluation counts."""
    count = 0

    def closure() -> Tensor:
        nonlocal count
        optimizer.zero_grad()
        loss = plain(model, batch(size, at, count))
        loss.backward()
        count += 1
        return loss

    def search() -> Tensor:
        closure()
        return closure()

    optimizer.step(search)
    optimizer.zero_grad()


def scaled(model: nn.Module, optimizer: torch.optim.Optimizer, size: tuple[int, ...], at: int) -> None:
    """A step that overflows is skipped, before each that does not."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor in (float("inf"), 1.0):
        loss = plain(model, batch(size, at))
        loss.register_hook(lambda g, f=factor: g * f)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


def checkpointed(model: nn.Module, x: Tensor) -> Tensor:
    from torch.utils.checkpoint import checkpoint

    return checkpoint(model, checkpoint(model, x, use_reentrant=False), use_reentrant=True).square().mean()


LOOPS = {
    "plain": one(plain),
    "siamese": one(siamese),
    "recurrent": one(lambda model, x: plain(model, model(x))),
    "gradient penalty": one(penalty),
    "gradient penalty and loss": one(lambda model, x: penalty(model, x) + plain(model, x)),
    "checkpoints": one(checkpointed),
    "accumulation": accumulate,
    "zero first": zero_first,
    "gan": gan(True, False),
    "gan, to zero": gan(False, False),
    "gan, by the model": gan(True, True),
    "gan, accumulation": gan(True, False, 2),
    "gan, to zero, accumulation": gan(False, True, 2),
    "sam": sam,
    "closures": closures,
    "scaled": scaled,
}
"""Each makes one step of the optimizer and leaves the model without gradients, or those of the step."""


class Taken:
    """Notes the gradients that an optimizer takes, of the whole weights of a dense twin."""

    def __init__(self, model: nn.Module) -> None:
        self.model = sk.densify(copy.deepcopy(model))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)
        self.optimizer.register_step_post_hook(self.note)
        self.gradients: dict[str, Tensor] = {}

    def note(self, *_: object) -> None:
        self.gradients = {name: m.weight.grad.clone() for name, m in self.model.named_modules() if hasattr(m, "weight")}


def expected(layer: sk.SparseLinear | sk.SparseConv2d, gradient: Tensor) -> set[int]:
    """Return the empty places with the largest blocks of a dense gradient."""
    cells = torch.arange(layer.grid.cells, dtype=torch.int32)
    everywhere = sk.topology.Topology(layer.grid, cells // layer.grid.cols, cells % layer.grid.cols)
    norms = sk.topology.gather_blocks(everywhere, gradient).norm(dim=(1, 2))
    present = layer.topology.keys().long()
    norms[present] = -1
    return set(norms.topk(part_of(present.numel(), FRACTION)).indices.tolist())


def check(model: nn.Module, method: sk.Method, step: Callable[[nn.Module, torch.optim.Optimizer, int], None]) -> None:
    """Train until two updates were made, each compared with what the twin's gradient says."""
    twin, updates = Taken(model), 0
    for at in range(12):
        step(model, method.optimizer, at)
        step(twin.model, twin.optimizer, at)
        layers = method.layers
        before = {name: set(layer.topology.keys().tolist()) for name, layer in layers.items()}
        wanted = {name: expected(layer, twin.gradients[name]) for name, layer in layers.items()}
        if method.step():
            updates += 1
            for name, layer in layers.items():
                assert set(layer.topology.keys().tolist()) - before[name] == wanted[name], (name, at)
            twin = Taken(model)
        if updates == 2:
            return
    raise AssertionError(f"{updates} updates in 12 steps")


def build(model: nn.Module, name: str) -> sk.Method:
    kind, options = METHODS[name]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    return kind(model, optimizer, update_every=2, drop_fraction=lambda step: FRACTION, **options)


PAIRS = [
    (list(MODELS)[(n + m) % len(MODELS)], name, loop) for n, loop in enumerate(LOOPS) for m, name in enumerate(METHODS)
]
"""Every method in every loop, and both models with each of them."""


@pytest.mark.parametrize(("kind", "name", "loop"), PAIRS)
def test_what_grows_is_largest_in_the_gradient_that_the_optimizer_takes(kind, name, loop):
    make, size = MODELS[kind]
    model = make()
    method = build(model, name)
    check(model, method, lambda model, optimizer, at: LOOPS[loop](model, optimizer, size, at))
    if name == "RigL":
        several = {"siamese", "recurrent", "gradient penalty", "gradient penalty and loss", "checkpoints"}
        several |= {"accumulation", "gan, accumulation", "gan, to zero, accumulation"}
        assert method.state_dict()["screen"] == (loop in several)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_dropped_gradients_under_agent(name, set_to_none):
    """Which writes its correction into the gradients before the backward."""
    model = linear()
    method = build(model, name)
    agent = sk.AGENT(model, method.optimizer, method=method, gamma=1.0)
    batches = [batch((6, 18), i, "seen") for i in range(3)]
    for _ in range(2):
        agent.refresh(batches, lambda x: plain(model, x))
    agent.c[""] = 1.0

    def step(trained: nn.Module, optimizer: torch.optim.Optimizer, at: int) -> None:
        for loss, key in ((other, "dropped"), (plain, "first"), (plain, "second")):
            x = batch((6, 18), at, key)
            if trained is model:
                agent.backward(lambda loss=loss, x=x: loss(model, x))
                assert agent.metrics()["c"] == 1
            else:
                loss(trained, x).backward()
            if loss is other:
                optimizer.zero_grad(set_to_none=set_to_none)
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)

    check(model, method, step)


# Two ranks: each its own part of a batch, two backwards a step of which the first is not reduced, and one dropped.


def on_both(
    model: nn.Module, optimizer: torch.optim.Optimizer, size: tuple[int, ...], at: int, ranks: list[int]
) -> None:
    """Make a step of one rank, or of several one after the other."""
    parallel = isinstance(model, DistributedDataParallel)
    for rank in ranks:
        other(model, batch(size, at, "dropped", rank)).backward()
    optimizer.zero_grad(set_to_none=at % 2 == 0)
    for rank in ranks:
        with model.no_sync() if parallel else nullcontext():
            plain(model, batch(size, at, 0, rank)).backward()
        siamese(model, batch(size, at, 1, rank)).backward()
        plain(model, batch(size, at, 2, rank)).backward()
    optimizer.step()
    optimizer.zero_grad()


def run_rank(rank: int) -> int:
    compared = 0
    for make, size in MODELS.values():
        for name in METHODS:
            for as_view in (False, True):
                model = make()
                parallel = DistributedDataParallel(model, gradient_as_bucket_view=as_view)

                def step(trained: nn.Module, optimizer: torch.optim.Optimizer, at: int, m=model, d=parallel, s=size):
                    mine = trained is m
                    on_both(d if mine else trained, optimizer, s, at, [rank] if mine else [0, 1])

                check(model, build(model, name), step)
                compared += 1
    return compared


def test_two_ranks_grow_what_is_largest_in_their_common_gradient(tmp_path):
    assert on_ranks(run_rank, 2, tmp_path) == [2 * len(METHODS) * len(MODELS)] * 2


# What is heard, and what is said.


def test_dropped_gradients_do_not_make_rigl_screen(caplog):
    model = linear()
    method = build(model, "RigL")
    with caplog.at_level(logging.WARNING, "sparsekern"):
        for at in range(6):
            LOOPS["gan"](model, method.optimizer, (6, 18), at)
            method.step()
    assert method.updates == 3 and "screens" not in caplog.text and method.stages() == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", MODELS)
def test_a_captured_graph_that_probes_cannot_hear_is_warned_of_once(kind, name, caplog):
    make, size = MODELS[kind]
    model = make()
    method = build(model, name)
    traced = torch.jit.trace(model, batch(size, 0).detach())
    for at in range(8):
        plain(traced, batch(size, at)).backward()
        method.optimizer.step()
        method.optimizer.zero_grad()
        assert method.step() is False
    assert caplog.text.count(f"got no scores with the gradients of {', '.join(method.layers)}") == 1
    assert f"{method.__class__.__name__} got no scores" in caplog.text and "torch.jit.trace" in caplog.text


@pytest.mark.parametrize("name", METHODS)
def test_layers_that_took_no_part_are_not_warned_of(name, caplog):
    model = nn.ModuleDict({"used": linear(), "idle": sk.SparseLinear(12, 12, block_size=4, sparsity=0.5, dtype=F64)})
    method = build(model, name)
    for at, to_none in enumerate((True, False) * 3):
        plain(model["used"], batch((6, 18), at)).backward()
        method.optimizer.step()
        method.optimizer.zero_grad(set_to_none=to_none)
        method.step()
    assert method.updates == 3 and "got no scores" not in caplog.text


@pytest.mark.parametrize("every", [2, 3, 5])
@pytest.mark.parametrize("name", METHODS)
def test_step_called_every_second_optimizer_step_updates_by_the_last_one(name, every):
    """The step before it is over when the method is called; its gradients are gone."""
    model, size = linear(), (6, 18)
    kind, options = METHODS[name]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method = kind(model, optimizer, update_every=every, drop_fraction=lambda step: FRACTION, **options)

    def two(model: nn.Module, optimizer: torch.optim.Optimizer, at: int) -> None:
        for part in range(2):
            one(plain)(model, optimizer, size, 2 * at + part)

    check(model, method, two)
    updates = method.updates
    for at in range(60):
        two(model, optimizer, at)
        method.step()
    period = max(every, 2 * method.stages())
    assert method.updates - updates >= 120 // period - 2, "as often as the schedule, or the stages, allow"
