"""The choice of the backend that runs an op: the fastest that can, or the one asked for, which never falls back."""

from __future__ import annotations

import functools
import logging
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from sparsekern.kernels import cpu, eager, gpu
from sparsekern.kernels.contract import Backend, Geometry, Kernels
from sparsekern.kernels.cpu.library import load
from sparsekern.topology.arguments import check_choice

BACKENDS: dict[str, Backend] = {"gpu": gpu, "cpu": cpu, "eager": eager}
"""Fastest first."""

DEVICE_TYPES = {"gpu": "cuda", "cpu": "cpu"}
"""The device where ``"auto"`` takes a backend. Asked for by name, "gpu" also runs on a CPU, in Triton's interpreter."""

USUAL = (torch.float32, (32, 32))
"""A dtype and a block size that every fast backend supports."""

AUTO = "auto"

_requested = AUTO
_log = logging.getLogger("sparsekern")


class backend:
    """Ask for one backend, or for ``"auto"``, the fastest that can (the default).

    A statement holds until the next one, a ``with`` block until its end. There is one setting for the whole process:
    where blocks of two threads or tasks overlap, the one entered last holds, and each ends only its own. A backward
    runs on the backend of its forward, wherever it is called.

    Args:
        name: ``"auto"`` or a name in :data:`sparsekern.ops.backends.BACKENDS`.

    Raises:
        ValueError: unknown name. (An op that the backend cannot run raises :class:`NotImplementedError` when called.)

    Example:
        >>> import sparsekern as sk
        >>> with sk.backend("eager"):
        ...     y = sk.SparseLinear(64, 64, block_size=16)(torch.ones(2, 64))
    """

    def __init__(self, name: str) -> None:
        global _requested
        check_choice("backend", name, (AUTO, *BACKENDS))
        self._name, self._entered = name, False
        last = [s for s in _settings if not s._entered][-1:]  # the statement that holds again after this block
        _settings[:] = [*(setting for setting in _settings if setting._entered or setting in last), self]
        _requested = name

    def __enter__(self) -> backend:
        self._entered = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _requested
        if self in _settings:
            _settings.remove(self)
        _requested = _settings[-1]._name if _settings else AUTO


_settings: list[backend] = []


def requested_backend() -> str:
    """Return the name that :class:`backend` was last given."""
    return _requested


def supports(name: str, op: str, device: torch.device, dtype: torch.dtype, block: tuple[int, int]) -> bool:
    """Return whether a backend can run an op on tensors of such a device and dtype.

    Args:
        name: ``"gpu"``, ``"cpu"`` or ``"eager"``.
        op: such as ``"linear"``.
        device, dtype: of the input.
        block: ``(bo, bi)`` of the weight.
    """
    return BACKENDS[name].why_not(op, device, dtype, block) is None


def resolve(name: str, op: str, x: torch.Tensor, block: tuple[int, int]) -> str:
    """Return the backend that runs ``op``: the one asked for, or the first that can.

    Raises:
        NotImplementedError: the one asked for cannot; the text says why.
    """
    if name == AUTO:
        return _fastest(op, x.device, x.dtype, block)
    reason = BACKENDS[name].why_not(op, x.device, x.dtype, block)
    if reason is not None:
        raise NotImplementedError(
            f"backend {name!r} cannot run {op}: {reason}. Ask for another one, or for backend('auto')"
        )
    return name


def _fastest(op: str, device: torch.device, dtype: torch.dtype, block: tuple[int, int]) -> str:
    kind = device.type  # builds a string each time, which takes as long as the rest of an iteration
    for name, candidate in BACKENDS.items():
        if DEVICE_TYPES.get(name, kind) != kind:
            continue
        reason = candidate.why_not(op, device, dtype, block)
        if reason is None:
            return name
        if name == "cpu" and reason != candidate.why_not(op, device, *USUAL):
            continue  # nothing runs float64 or odd blocks faster; that the library is missing is worth a warning
        _say_once(name, op, reason)
    raise AssertionError("the eager backend runs everything")


@functools.cache
def _say_once(name: str, op: str, reason: str) -> None:
    _log.warning("the slower backend runs %s, because %r cannot: %s", op, name, reason)


def kernels_for(name: str, geometry: Geometry, x: torch.Tensor, block: tuple[int, int]) -> Kernels[Any]:
    """Return the kernels that run a geometry on the backend that :func:`resolve` returns; its errors too."""
    return BACKENDS[resolve(name, geometry.op, x, block)].kernels(geometry)


def runs_natively(*tensors: Tensor | None, is_op: bool = False) -> bool:
    """Return whether a function that is no op of PyTorch's dispatcher may compute with these tensors.

    It takes the place of PyTorch's ops, which alone can be compiled and differentiated forward: nothing may trace,
    count or transform the call.

    Args:
        tensors: those that it reads; None is one that is absent. The first is no parameter, nor any other subclass.
        is_op: whether what computes natively is an op after all, which a step that is only foretold on tensors without
            data then calls too (:func:`sparsekern.analysis.plan.trace`).
    """
    foretold = is_op and _is_foretold(tensors[0])
    return (
        (type(tensors[0]) is Tensor or foretold)
        and all(t is None or (t.dtype is torch.float32 and t.is_cpu) for t in tensors)
        and not _ops_are_observed(foretold)
        and requested_backend() in ("auto", "cpu")
        and load()[0] is not None
    )


def differentiates_natively(dy: Tensor, is_op: bool = False) -> bool:
    """Return whether the backward of such a function may compute with the gradient of its output.

    If not, PyTorch's ops compute it: they are differentiated themselves (backward, or forward if dy has a tangent),
    mapped over a batch of gradients, or counted.
    """
    batched = torch._C._functorch.is_legacy_batchedtensor(dy)  # by is_grads_batched
    return not (batched or torch.is_grad_enabled() or _ops_are_observed(is_op and _is_foretold(dy)))


def _is_foretold(x: Tensor | None) -> bool:
    """Return whether a tensor has no data, and no graph of PyTorch's ops is made of what it goes through."""
    return isinstance(x, FakeTensor) and get_proxy_mode() is None


def _ops_are_observed(foretold: bool) -> bool:
    """Return whether calls of PyTorch's ops are compiled, traced, transformed, counted or differentiated forward."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or (torch._C._len_torch_dispatch_stack() > 0 and not foretold)
        or forward_ad._current_level >= 0
    )
