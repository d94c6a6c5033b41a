"""Registration of ops: schema, fake, implementation, autocast; and a geometry as it goes through a schema.

``Library.define/impl`` with an ``autograd.Function`` at the ``Autograd`` key has half the call overhead of
``torch.library.custom_op``, gives one graph under ``torch.compile``, and passes ``opcheck``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sparsekern.kernels.contract import ConvShape, Geometry, LinearShape

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


def pack(geometry: Geometry) -> list[int]:
    """Return the numbers of a geometry in their order, for a schema: 2 of a linear layer, 13 of a convolution."""
    if isinstance(geometry, LinearShape):
        return [geometry.in_features, geometry.out_features]
    return [
        geometry.in_channels,
        geometry.out_channels,
        *geometry.kernel,
        *geometry.stride,
        *geometry.padding,
        *geometry.dilation,
        geometry.groups,
    ]


def unpack(numbers: Sequence[int]) -> Geometry:
    """Return the geometry that :func:`pack` packed."""
    if len(numbers) == 2:
        return LinearShape(numbers[0], numbers[1])
    in_channels, out_channels, kh, kw, sh, sw, top, bottom, left, right, dh, dw, groups = numbers
    return ConvShape(in_channels, out_channels, (kh, kw), (sh, sw), (top, bottom, left, right), (dh, dw), groups)


def channels_last(x: Tensor) -> Tensor:
    """Return images ``x (N, C, H, W)`` with ``x.permute(0, 2, 3, 1)`` contiguous: x itself if they are so, else a copy.

    The tokens ``(T, F)`` of a linear layer may have any strides and are returned as they are.
    """
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def as_tokens(x: Tensor) -> Tensor:
    """Return ``(T, F)``, a view: the pixels of images that are channels last, or the tokens of a linear layer."""
    return x.permute(0, 2, 3, 1).flatten(0, 2) if x.dim() == 4 else x
