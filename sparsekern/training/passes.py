"""Passes over a batch: closures, extra passes that leave no trace, their cost, and statistics of norm layers."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from sparsekern.errors import InputError
from sparsekern.nn import BlockSparse, sparse_layers
from sparsekern.nn.surgery import restored
from sparsekern.topology.arguments import check_kind
from sparsekern.training.distributed import sharded_modules


def loss_of(closure: Callable[[], Tensor]) -> Tensor:
    """Call a closure and return the loss ``()`` that it computes.

    Raises:
        TypeError: it is not a function.
        ValueError: it returns something else than a tensor of one number, or, where gradients are enabled, a tensor
            that requires no gradient.
    """
    if not callable(closure):
        raise TypeError(
            f"closure is a {type(closure).__name__}; it must be a function that computes the loss, such as "
            "lambda: loss_fn(model(x), y)"
        )
    loss = closure()
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"type {type(loss).__name__}"
        raise InputError(f"the closure returned a loss of {what}; it must return a tensor of one number")
    if torch.is_grad_enabled() and not loss.requires_grad:
        raise InputError("the closure returned a loss that requires no grad; compute it from the model's output")
    return loss


def backpropagate(loss: Tensor, scaler: torch.amp.GradScaler | None) -> Tensor:
    """Backpropagate a loss ``()``, scaled if there is a scaler; return it detached and not scaled."""
    (loss if scaler is None else scaler.scale(loss)).backward()
    return loss.detach()


def scale_of(scaler: torch.amp.GradScaler | None, device: torch.device) -> Tensor:
    """Return the factor ``()`` by which gradients are scaled; does not synchronise the device."""
    one = torch.ones((), device=device)
    return one if scaler is None else scaler.scale(one)


class RandomState:
    """The state of torch's global generators: that of the CPU, and of the CUDA devices that a model is on."""

    def __init__(self, model: nn.Module) -> None:
        self._devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
        self._cpu = torch.get_rng_state()
        self._cuda = [torch.cuda.get_rng_state(device) for device in self._devices]

    def restore(self) -> None:
        """Set the generators back to this state, so that dropout draws the same numbers again."""
        torch.set_rng_state(self._cpu)
        for device, state in zip(self._devices, self._cuda, strict=True):
            torch.cuda.set_rng_state(state, device)


@contextmanager
def keep_norm_statistics(model: nn.Module) -> Iterator[None]:
    """Restore the running statistics of batch and instance norms at the end.

    Must not enclose a forward whose backward comes after the context.
    """
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.training and m.track_running_stats]
    with restored(buffer for norm in norms for buffer in norm.buffers()):
        yield


@contextmanager
def without_sync(model: nn.Module) -> Iterator[None]:
    """Accumulate gradients of DistributedDataParallel, if the model is or holds one, without any communication.

    The broadcast of buffers is left to the next pass too.
    """
    with ExitStack() as stack:
        for module in parallel_modules(model):
            stack.enter_context(module.no_sync())
            # no_sync makes the next forward skip its broadcast of buffers: restore the flag that says so.
            stack.callback(setattr, module, "require_forward_param_sync", module.require_forward_param_sync)
            module.require_forward_param_sync = False
        yield


def parallel_modules(model: nn.Module) -> list[DistributedDataParallel]:
    """Return the DistributedDataParallel modules of a model, itself included."""
    return [module for module in model.modules() if isinstance(module, DistributedDataParallel)]


@contextmanager
def without_probes(layers: Iterable[BlockSparse]) -> Iterator[None]:
    """Disable the probes of layers."""
    armed = [(layer, layer.probe) for layer in layers if layer.probe is not None]
    try:
        for layer, _ in armed:
            layer.probe = None
        yield
    finally:
        for layer, probe in armed:
            layer.probe = probe


@contextmanager
def without_gradients(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Set the gradients of parameters aside, and restore them at the end."""
    kept = [(parameter, parameter.grad) for parameter in parameters]
    try:
        for parameter, _ in kept:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient


@contextmanager
def resharded(model: nn.Module) -> Iterator[None]:
    """Begin and end with each rank holding its shards only, and reduce gradients over ranks, under ``fully_shard``."""
    modules = sharded_modules(model)
    for module in modules:
        module.reshard()
        module.set_requires_gradient_sync(True, recurse=False)
    try:
        yield
    finally:
        for module in modules:
            module.reshard()


@contextmanager
def extra_passes(model: nn.Module) -> Iterator[None]:
    """Run passes, with their backwards, that leave no trace but gradients.

    These are of this rank alone; under ``fully_shard`` they are its shards of the mean over ranks.
    """
    layers = sparse_layers(model).values()
    with keep_norm_statistics(model), without_sync(model), resharded(model), without_probes(layers):
        yield


def perturbed(model: nn.Module, closure: Callable[[Any], Tensor], perturb: Callable[[], Any]) -> Callable[[], Tensor]:
    """Call ``perturb`` without a trace in the model, and return the closure of the batch that it made."""
    with extra_passes(model), without_gradients(model.parameters()):
        batch = perturb()
    return lambda: closure(batch)


class ExtraCost:
    """FLOPs and seconds of the passes that a plain training does not make.

    The FLOPs of the first pass of each kind are counted, and those of later ones assumed equal until :meth:`recount`:
    counting slows a pass down. Seconds are wall-clock time of the host.
    """

    def __init__(self) -> None:
        self.flops = 0
        self.seconds = 0.0
        self._of_pass: dict[str, int] = {}

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Add the seconds that the context takes."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - began

    @contextmanager
    def counted(self, kind: str) -> Iterator[None]:
        """Add the FLOPs of one pass of this kind."""
        if kind in self._of_pass:
            yield
        else:
            # A compiled graph cannot be counted, and one with fullgraph=True not even run under the counter.
            with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
                warnings.filterwarnings("ignore", "Using `torch.compile", UserWarning)  # the counter's own hooks
                with FlopCounterMode(display=False) as counter:
                    yield
            self._of_pass[kind] = counter.get_total_flops()
        self.flops += self._of_pass[kind]

    def recount(self) -> None:
        """Count the next pass of every kind again, because topology or batches may have changed."""
        self._of_pass.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the counts; those that have other names in the course of a run are in a tuple."""
        return {"flops": self.flops, "seconds": self.seconds, "of_pass": (dict(self._of_pass),)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned."""
        self.flops, self.seconds, self._of_pass = state["flops"], state["seconds"], dict(state["of_pass"][0])


@torch.no_grad()
def recalibrate_norms(model: nn.Module, batches: Iterable[Any]) -> int:
    """Compute the running statistics of batch and instance norms anew, as plain means over batches.

    Needed after a choice of blocks that is final, as at the end of VR-PGE: until then the statistics average over many
    networks.

    Args:
        model: keeps its training and evaluation modes. Dropout is off during the passes.
        batches: inputs of the model; of a tuple or list the first element is taken.

    Returns:
        The number of norm layers.

    Raises:
        ValueError: there are no batches. The statistics stay as they were.
    """
    check_kind("model", model, nn.Module, "a torch.nn.Module")
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    if not norms:
        return 0
    modes = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    kept = [(b, b.clone()) for norm in norms for b in norm.buffers()]
    count = 0
    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # PyTorch then takes a plain mean
            norm.train()
        for batch in batches:
            model(batch[0] if isinstance(batch, (tuple, list)) else batch)
            count += 1
    finally:
        for module, training in modes.items():
            module.training = training
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        if count == 0:
            for buffer, copy in kept:
                buffer.copy_(copy)
    if count == 0:
        raise InputError(
            "batches is empty; give some of the training set, a few hundred inputs or more", parameter="batches"
        )
    return len(norms)
