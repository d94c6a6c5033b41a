"""Registration of ops: schema, fake, implementation, autocast, in the form that costs least per call.

``Library.define/impl`` with an ``autograd.Function`` at the ``Autograd`` key has half the call overhead of
``torch.library.custom_op``, gives one graph under ``torch.compile``, and passes ``opcheck``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

LIBRARY = torch.library.Library("sparsekern", "DEF")
"""Alive as long as the module: the registrations go with it."""

Result = TypeVar("Result", Tensor, tuple[Tensor, Tensor])
"""What an op may return."""

AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def define(
    name: str,
    schema: str,
    *,
    fake: Callable[..., Result],
    run: Callable[..., Result],
    autograd: Callable[..., Result],
    casts: tuple[int, ...] = (),
) -> Callable[..., Result]:
    """Register ``sparsekern::name`` and return the function that calls it.

    Args:
        name: name of the op.
        schema: its arguments and result; sizes as ``SymInt``, or every batch size would compile anew.
        fake: the shape, dtype, device and strides of the result, which is a tensor or two.
        run: the implementation, for every device.
        autograd: what runs at the Autograd key; calls :func:`below_autograd` at the end.
        casts: positions of arguments that autocast casts to its dtype. Weights are not among them: they stay in
            their own dtype, and kernels round what they read.
    """
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparsekern::{name}", fake, lib=LIBRARY)
    LIBRARY.impl(name, autograd, "Autograd")
    op: Callable[..., Result] = getattr(torch.ops.sparsekern, name).default
    for device_type, key in AUTOCAST_KEYS.items():
        LIBRARY.impl(name, _autocast_kernel(op, device_type, key, casts), key)
    return op


def below_autograd(op: Callable[..., Result], *args: Any) -> Result:
    """Call the implementation of an op from its own autograd kernel."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def derivative(op: Callable[..., Result], *args: Any) -> Result:
    """Call an op in a backward: below autograd, unless that backward is differentiated itself."""
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        return op(*args)
    return below_autograd(op, *args)


def wants_grad(*tensors: Tensor | None) -> bool:
    """Return whether autograd has to record a call on these tensors.

    Raises:
        NotImplementedError: one carries a tangent of forward-mode differentiation, which would be lost without a word.
    """
    if forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    ):
        raise NotImplementedError(
            "sparsekern's ops have no forward-mode derivative (torch.func.jvp, jacfwd, dual numbers); "
            "use reverse mode, or sparsekern.densify(model)"
        )
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _autocast_kernel(
    op: Callable[..., Result], device_type: str, key: str, casts: tuple[int, ...]
) -> Callable[..., Result]:
    """Cast, then call with autocast off: a kernel made of PyTorch ops would be cast again inside.

    An own kernel rather than ``torch.library.register_autocast``, which freezes one dtype at registration.
    """
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(*args: Any) -> Result:
        dtype = torch.get_autocast_dtype(device_type)
        cast = [_cast(a, dtype) if i in casts else a for i, a in enumerate(args)]
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return op(*cast)

    return kernel


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast as autocast does: float64 and integers stay."""
    return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x
