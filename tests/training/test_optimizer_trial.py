"""Optimizers that are not PyTorch's own are tried when a method is built: what they keep by slots, how that begins."""

from __future__ import annotations

import copy
import importlib
import itertools

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import sparsekern as sk
from sparsekern.training.optimizer_state import LEAST, SMALL, _sizes, slot_state


class Foreign(torch.optim.Optimizer):
    """Keeps what a subclass says, and descends."""

    def __init__(self, params, lr=1e-2, **options):
        super().__init__(params, {"lr": lr, **options})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.one(p, self.state[p], group)

    def one(self, p, state, group):
        p.sub_(p.grad, alpha=group["lr"])


class EightBit(Foreign):
    """As bitsandbytes: codes in the table that all parameters share."""

    def __init__(self, params):
        super().__init__(params)
        self.table = torch.linspace(-1, 1, 256)

    def one(self, p, state, group):
        state.setdefault("state1", torch.zeros_like(p, dtype=torch.uint8))
        state["qmap1"] = self.table
        super().one(p, state, group)


class Packed(torch.Tensor):
    """As torchao's states: a subclass, which cannot be filled in place."""


class Subclass(Foreign):
    def one(self, p, state, group):
        state.setdefault("exp_avg", torch.zeros_like(p).as_subclass(Packed))


class Factored(Foreign):
    """As the Adafactor of Transformers, and CAME: axes left out instead of reduced to 1."""

    def one(self, p, state, group):
        if p.dim() < 2:
            return
        state.setdefault("exp_avg_sq_row", torch.zeros(p.shape[:-1]))
        state.setdefault("exp_avg_sq_col", torch.zeros(p.shape[:-2] + p.shape[-1:]))
        state["RMS"] = p.norm()
        state["exp_avg_sq_row"].mul_(0.9).add_(p.grad.square().mean(-1) + 1e-30, alpha=0.1)
        state["exp_avg_sq_col"].mul_(0.9).add_(p.grad.square().mean(-2) + 1e-30, alpha=0.1)
        r = state["exp_avg_sq_row"] / state["exp_avg_sq_row"].mean(-1, keepdim=True)
        p.sub_(p.grad * r.rsqrt()[..., None] * state["exp_avg_sq_col"].rsqrt()[:, None], alpha=group["lr"])


class Divides(Foreign):
    """As D-Adaptation's Adagrad and VSGD: the state begins above zero, because the step divides by it."""

    def one(self, p, state, group):
        if not state:
            self.state[p] = state = {"alphak": torch.full_like(p, 1e-6), "x0": p.detach().clone()}
        state["alphak"].add_(p.grad.square())
        p.copy_(state["x0"] - group["lr"] * p.grad / state["alphak"])


class DividesByTheLast(Divides):
    """Enters its state as the result of a computation, which is no beginning, and divides by it."""

    def one(self, p, state, group):
        before = state.get("last", p.grad + 1)
        p.sub_(p.grad * (before != 0) / before, alpha=group["lr"])
        state["last"] = p.grad.clone()


class Late(Foreign):
    """As a slow copy of the weights, taken after some steps."""

    def one(self, p, state, group):
        state["steps"] = state.get("steps", 0) + 1
        if state["steps"] == 20:
            state["slow"] = p.detach().clone()
        super().one(p, state, group)


class Drawn(Foreign):
    def one(self, p, state, group):
        state.setdefault("v", torch.randn_like(p))


class OutOfPlace(Foreign):
    """Keeps a direction of all parameters in no parameter's state."""

    def one(self, p, state, group):
        self.state.setdefault("all", {})[p.shape] = torch.zeros_like(p)


class Fails(Foreign):
    def one(self, p, state, group):
        raise LookupError("no curvature")


class Coupled(Foreign):
    def one(self, p, state, group):
        state.setdefault("precond", torch.eye(p.shape[0]))


class NeedsClosure(Foreign):
    def step(self, closure):
        with torch.enable_grad():
            loss = closure()
        assert loss.dim() == 0
        super().step()


class OfMode(Foreign):
    """As schedule-free optimizers."""

    mode = False

    def train(self):
        self.mode = True

    def step(self, closure=None):
        if not self.mode:
            raise RuntimeError("not in train mode")
        super().step()


class Shared(Foreign):
    """Parts that a step writes into."""

    def __init__(self, params):
        super().__init__(params)
        self.calls, self.total = [], torch.zeros(())

    def one(self, p, state, group):
        self.calls.append(1)
        self.total += torch.rand(())
        super().one(p, state, group)


def model(sizes: tuple[int, ...] = (8, 12)) -> nn.Sequential:
    return nn.Sequential(
        *(
            sk.SparseLinear(n, m, block_size=(4, 2), blocks=5, seed=0, name=str(i))
            for i, (n, m) in enumerate(itertools.pairwise(sizes))
        )
    )


def wide() -> nn.Sequential:
    """256 slots: as many as a table of 8 bits has entries."""
    return nn.Sequential(sk.SparseLinear(128, 128, block_size=4, blocks=256, seed=0, name="0"))


@pytest.mark.parametrize(
    ("make", "net", "text"),
    [
        (EightBit, wide, r"EightBit keeps 'qmap1' for values of '0', of shape \(256,\), and \(256,\) for 2\d\d slots"),
        (Subclass, model, "Subclass keeps 'exp_avg' for values of '0', a Packed, which cannot be reset by slots"),
        (Coupled, model, r"'precond' for values of '0', of shape \(5, 5\), and \(4, 4\) for 4 slots: not one part"),
        (Drawn, model, "Drawn keeps 'v' for values of '0', which begins with no one number"),
        (OutOfPlace, model, "OutOfPlace keeps 'all' for all parameters together"),
        (Fails, model, "Fails cannot be tried on a parameter of its own, which raised LookupError: no curvature"),
        (DividesByTheLast, model, "DividesByTheLast makes NaN of a block that moves"),
    ],
)
def test_refused_when_the_method_is_built(make, net, text):
    net = net()
    optimizer = make(net.parameters())
    state = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=text):
        sk.SET(net, optimizer)
    assert not optimizer.state
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


def train(net, optimizer, method, steps=4):
    moved = []
    for step in range(steps):
        x = torch.randn(6, net[0].grid.in_features, generator=torch.Generator().manual_seed(step))
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        moved.append(method.step())
    return moved


@pytest.mark.parametrize(
    ("make", "fresh"),
    [
        (Factored, {"exp_avg_sq_row": 0.0, "exp_avg_sq_col": 0.0}),
        (Divides, {"alphak": float(torch.tensor(1e-6)), "x0": 0.0}),
        (NeedsClosure, {}),
        (OfMode, {}),
    ],
)
def test_what_follows_begins_as_in_a_fresh_optimizer(make, fresh):
    net = model((8, 12, 8))
    optimizer = make(net.parameters())
    method = sk.SET(net, optimizer, update_every=1, drop_fraction=0.4)
    for layer, name in zip(net, ("0", "1"), strict=True):
        optimizer.state[layer.values].update({key: torch.ones(5) for key in fresh})
        assert {s.key: s.fresh for s in slot_state(optimizer, layer.values, name)} == fresh
        optimizer.state.clear()
    if make is OfMode:
        optimizer.train()
    if make is NeedsClosure:
        return
    assert train(net, optimizer, method) == [True] * 4
    for layer in net:
        assert layer.values.isfinite().all()
        moved = (layer.values == 0).all(dim=(1, 2))
        assert moved.sum() == 2
        for key, value in fresh.items():
            assert (optimizer.state[layer.values][key][moved] == value).all()


def test_a_state_that_comes_late_stops_the_update_before_the_first_write():
    net = model((8, 12, 8))
    optimizer = Late(net.parameters())
    method = sk.SET(net, optimizer, update_every=20)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="Late keeps 'slow' for values of '0', which it did not in its first steps"):
        train(net, optimizer, method, 20)
    assert torch.equal(net[0].row, before["0.row"]) and torch.equal(net[1].row, before["1.row"])


def test_a_trial_leaves_no_trace():
    net = model()
    optimizer = Shared(net.parameters())
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append("own"))
    handle = register_optimizer_step_post_hook(lambda *_: calls.append("all"))
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)  # binds optimizer.step
    gradient = torch.ones_like(net[0].values)
    net[0].values.grad = gradient
    before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    try:
        sk.Static(net, optimizer)
    finally:
        handle.remove()
    assert torch.equal(random, torch.get_rng_state()) and scheduler.last_epoch == 0
    assert not calls and not optimizer.calls and not optimizer.total and not optimizer.state
    assert net[0].values.grad is gradient and (gradient == 1).all()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_a_trial_is_made_once_a_size():
    net = nn.Sequential(*(sk.SparseLinear(8, 8, block_size=4, blocks=3, name=str(i)) for i in range(3)))
    runs = []

    class Counts(Foreign):
        def one(self, p, state, group):
            runs.append(p.shape)

    optimizer = Counts(net.parameters())
    sk.Static(net, optimizer)
    once = len(runs)
    sk.Static(net, optimizer)
    assert once > 0 and len(runs) == once


@pytest.mark.parametrize(("slots", "elements"), [(1, 4096), (2, 16), (255, 16), (256, 16), (70_001, 16), (9, 10**6)])
def test_trial_parameters_are_small_and_alike(slots, elements):
    one, other = _sizes(slots, elements)
    assert one != other and min(one, other) >= 2
    assert max(one, other) * elements <= max(LEAST + 512 * elements, 3 * elements)
    if slots * elements > SMALL:
        assert (one * elements % 256 == 0) == (other * elements % 256 == 0) == (slots * elements % 256 == 0)
        assert min(one, other) * elements > SMALL


REAL = {
    "bitsandbytes.optim:AdamW": (None, {}),
    "bitsandbytes.optim:AdamW8bit": (r"keeps 'qmap1' for values of '0', of shape \(256,\)", {}),
    "torchao.optim:AdamW8bit": ("keeps 'exp_avg' for values of '0', an OptimState8bit", {}),
    "torchao.optim:AdamW4bit": ("keeps 'exp_avg' for values of '0', an OptimState4bit", {}),
    "torchao.optim:AdamWFp8": ("keeps 'exp_avg' for values of '0', an OptimStateFp8", {}),
    "transformers.optimization:Adafactor": (None, {}),
    "came_pytorch:CAME": (None, {"lr": 1e-3}),
    "lion_pytorch:Lion": (None, {}),
    "dadaptation:DAdaptAdaGrad": (None, {}),
    "dadaptation:DAdaptAdam": (None, {}),
    "schedulefree:AdamWScheduleFree": (None, {}),
    "prodigyopt:Prodigy": (r"keeps 's' for values of '0', of shape \(4096,\), which has no axis of 256 slots", {}),
    "pytorch_optimizer:Prodigy": (None, {}),
    "pytorch_optimizer:VSGD": (None, {}),
    "pytorch_optimizer:MADGRAD": (None, {}),
    "pytorch_optimizer:SOAP": ("keeps 'GG' for values of '0', a list", {}),
}


@pytest.mark.parametrize("name", REAL)
def test_the_real_ones(name):
    """Skipped where the library is not installed: none is needed for anything else."""
    where, what = name.split(":")
    pytest.importorskip(where.split(".")[0], reason="an optional library of optimizers")
    text, options = REAL[name]
    net = wide()
    optimizer = getattr(importlib.import_module(where), what)(net.parameters(), **options)
    if text is not None:
        with pytest.raises(ValueError, match=text):
            sk.SET(net, optimizer)
        return
    method = sk.SET(net, optimizer, update_every=2)
    if callable(getattr(optimizer, "train", None)):
        optimizer.train()
    assert train(net, optimizer, method, 8) == [False, True] * 4
    assert all(p.isfinite().all() for p in net.parameters())
