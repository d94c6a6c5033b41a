"""Several passes over one batch that differ in nothing but what they are to compare."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel

from sparsekern.nn import BlockSparse, sparse_layers


class Randomness:
    """The state of torch's global generators, of the CPU and of the CUDA devices that a model is on."""

    def __init__(self, model: nn.Module) -> None:
        self._devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
        self._cpu = torch.get_rng_state()
        self._cuda = [torch.cuda.get_rng_state(device) for device in self._devices]

    def restore(self) -> None:
        """Go back to it, so that dropout draws the same again."""
        torch.set_rng_state(self._cpu)
        for device, state in zip(self._devices, self._cuda, strict=True):
            torch.cuda.set_rng_state(state, device)


@contextmanager
def keep_norm_statistics(model: nn.Module) -> Iterator[None]:
    """Undo what passes do to the running statistics of batch and instance norms; the passes see what they always see.

    Must not enclose a pass whose backward is yet to come.
    """
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.training and m.track_running_stats]
    kept: list[tuple[Tensor, Tensor]] = [(b, b.detach().clone()) for norm in norms for b in norm.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, copy in kept:
                buffer.copy_(copy)


@contextmanager
def without_sync(model: nn.Module) -> Iterator[None]:
    """Let gradients of DistributedDataParallel, if the model is or holds one, add up without a word to other ranks.

    Spares the pass the copy of the first rank's buffers too, which the next pass makes.
    """
    with ExitStack() as stack:
        for module in parallel_modules(model):
            stack.enter_context(module.no_sync())
            # What a forward under no_sync leaves behind would spare the copy to the next forward instead.
            stack.callback(setattr, module, "require_forward_param_sync", module.require_forward_param_sync)
            module.require_forward_param_sync = False
        yield


def parallel_modules(model: nn.Module) -> list[DistributedDataParallel]:
    """Return the DistributedDataParallel that the model is, and those that it holds."""
    return [module for module in model.modules() if isinstance(module, DistributedDataParallel)]


@contextmanager
def without_probes(layers: Iterable[BlockSparse]) -> Iterator[None]:
    """Let probes hear nothing of a pass."""
    armed = [(layer, layer.probe) for layer in layers if layer.probe is not None]
    try:
        for layer, _ in armed:
            layer.probe = None
        yield
    finally:
        for layer, probe in armed:
            layer.probe = probe


@contextmanager
def without_gradients(model: nn.Module) -> Iterator[None]:
    """Let passes find no gradients, and leave none: those from before are there again at the end."""
    kept = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _ in kept:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient


@contextmanager
def extra_passes(model: nn.Module) -> Iterator[None]:
    """Let passes, with their backwards, leave no trace but gradients: of this rank alone, and no probe hears them."""
    with keep_norm_statistics(model), without_sync(model), without_probes(sparse_layers(model).values()):
        yield


def scale_of(scaler: torch.amp.GradScaler | None, device: torch.device) -> Tensor:
    """Return by what gradients are scaled, ``()``; does not wait for the device."""
    one = torch.ones((), device=device)
    return one if scaler is None else scaler.scale(one)


def perturbed(model: nn.Module, closure: Callable[[Any], Tensor], perturb: Callable[[], Any]) -> Callable[[], Tensor]:
    """Return the closure of a batch that ``perturb`` makes now, by passes that leave no trace in the model."""
    with extra_passes(model), without_gradients(model):
        batch = perturb()
    return lambda: closure(batch)
