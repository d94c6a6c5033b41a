"""Optimizers in the wrappers of accelerate and Lightning: the method acts in the one that makes the steps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.training.optimizer_state import unwrapped
from tests.training.test_base import batch, make


class AcceleratedOptimizer(torch.optim.Optimizer):
    """An imitation of accelerate's: a property for each part of the inner one, and no ``__init__`` of PyTorch's."""

    def __init__(self, optimizer, scaler=None, every=1):
        self.optimizer, self.scaler, self.every, self.calls = optimizer, scaler, every, 0

    state = property(lambda self: self.optimizer.state)
    param_groups = property(lambda self: self.optimizer.param_groups)
    defaults = property(lambda self: self.optimizer.defaults)

    def step(self, closure=None):
        self.calls += 1
        if self.calls % self.every:
            return
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step(closure)

    def zero_grad(self):
        if self.calls % self.every == 0:
            self.optimizer.zero_grad()


class LightningOptimizer:
    """An imitation of Lightning's: takes over the class of what it wraps, and hands on every other attribute."""

    def __init__(self, optimizer):
        self._optimizer = optimizer
        self.__class__ = type("Lightning" + type(optimizer).__name__, (type(self), type(optimizer)), {})

    def step(self, closure=None):
        return self._optimizer.step(closure)

    def __getattr__(self, item):
        return getattr(self._optimizer, item)


class KeepsItsOwn(AcceleratedOptimizer):
    """A wrapper by name, with a state of its own."""

    state = {}  # noqa: RUF012


class Average(torch.optim.Optimizer):
    """Hands on state and groups, but does more than that: not certain."""

    def __init__(self, optimizer):
        self.optimizer, self.reference = optimizer, [p.clone() for p in optimizer.param_groups[0]["params"]]

    state = property(lambda self: self.optimizer.state)
    param_groups = property(lambda self: self.optimizer.param_groups)


WRAPPERS = {
    "accelerate": AcceleratedOptimizer,
    "lightning": LightningOptimizer,
    "both": lambda optimizer: AcceleratedOptimizer(LightningOptimizer(optimizer)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("kind", [sk.SET, sk.RigL, sk.VRPGE])
def test_the_inner_one_is_followed(kind, wrap):
    def run(wrap):
        model = make()
        inner = torch.optim.AdamW(model.parameters(), lr=0.01)
        outer = wrap(inner)
        method = kind(model, outer, update_every=3, stop=9)
        agent = sk.AGENT(model, outer, method=method, gamma=0.0)
        assert method.optimizer is inner and agent.optimizer is inner
        moved = []
        for step in range(10):
            agent.backward(lambda step=step: model(batch(step)).square().mean())
            outer.step()
            outer.zero_grad()
            moved.append(agent.step())
        return model.state_dict(), moved, method.steps

    (state, moved, steps), (expected, theirs, _) = run(wrap), run(lambda optimizer: optimizer)
    assert moved == theirs and any(moved) and steps == 10
    assert all(torch.equal(value, expected[key]) for key, value in state.items())


def test_the_steps_really_made_are_counted():
    model = make()
    inner = torch.optim.AdamW(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu")
    outer = AcceleratedOptimizer(inner, scaler, every=2)
    method = sk.SET(model, outer, update_every=1, drop_fraction=0.5)
    seen = []
    for step in range(8):
        factor = float("inf") if step == 3 else 1.0  # the second step overflows, and is skipped
        scaler.scale(model(batch(step)).square().mean() * factor).backward()
        outer.step()
        outer.zero_grad()
        seen.append(method.step())
    assert method.steps == 3 and seen == [False, True, False, False, False, True, False, True]


def test_what_is_not_certain_is_refused():
    model = make()
    inner = torch.optim.SGD(model.parameters())
    for outer in (KeepsItsOwn(inner), Average(inner)):
        assert unwrapped(outer) is outer
        with pytest.raises(ValueError, match=r"keeps its state in another optimizer \('optimizer'\)"):
            sk.SET(model, outer)
    for nothing in (None, [inner], nn.Linear(1, 1)):
        with pytest.raises(TypeError, match=r"optimizer is a \w+; it must be a torch.optim.Optimizer"):
            sk.SET(model, nothing)


def test_accelerate():
    accelerate = pytest.importorskip("accelerate", reason="an optional launcher")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, inner = make(), None
    inner = torch.optim.AdamW(model.parameters(), lr=0.01)
    model, optimizer = accelerator.prepare(model, inner)
    method = sk.RigL(model, optimizer, update_every=3, scoring="screen")
    assert method.optimizer is inner
    moved = []
    for step in range(16):
        with accelerator.accumulate(model):
            accelerator.backward(model(batch(step)).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        moved.append(method.step())
    assert method.steps == 8 and sum(moved) == 2 and moved[5] and moved[11]


@pytest.mark.filterwarnings("ignore")
def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning", reason="an optional launcher")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.moved = make(), []

        def configure_optimizers(self):
            return torch.optim.AdamW(self.net.parameters(), lr=0.01)

        def on_fit_start(self):
            self.method = sk.SET(self.net, self.optimizers(), update_every=2)

        def training_step(self, x, index):
            return self.net(x).square().mean()

        def on_train_batch_end(self, *args):
            self.moved.append(self.method.step())

    module = Module()
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        accumulate_grad_batches=2,
    )
    trainer.fit(module, torch.utils.data.DataLoader([batch(step) for step in range(12)], batch_size=None))
    assert module.method.steps == 6 and sum(module.moved) == 3
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    model = make()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapped, optimizer = fabric.setup(model, inner)
    method = sk.SET(model, optimizer, update_every=1)
    fabric.backward(wrapped(batch(0)).square().mean())
    optimizer.step()
    assert method.optimizer is inner and method.step()
