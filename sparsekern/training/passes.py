"""Several passes over one batch that differ in nothing but what they are to compare."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel


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
    """Let gradients of DistributedDataParallel, if the model is or holds one, add up without a word to other ranks."""
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, DistributedDataParallel):
                stack.enter_context(module.no_sync())
        yield
