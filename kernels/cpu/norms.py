"""Batch norm and ReLU of channels-last images on the native library, with the statistics of the batch itself."""

from __future__ import annotations

import ctypes

import torch
from sparsekern.kernels.cpu.library import call, numbers, positive, threads
from torch import Tensor

POINTERS = ("x", "residual", "dy", "y", "dx", "residual_grad", "weight", "bias", "stats", "grads")


class Norm(ctypes.Structure):
    """``NormCall`` of ``csrc/api.h``. It holds addresses: keep the tensors until the call is over."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in ("pixels", "channels", "threads")),
        ("eps", ctypes.c_double),
    )

    @classmethod
    def of(cls, eps: float, x: Tensor, **tensors: Tensor | None) -> Norm:
        """Describe a call on images ``(N, C, H, W)``; all tensors are float32, images channels last."""
        images, channels, height, width = x.shape
        addresses = {name: tensor.data_ptr() for name, tensor in tensors.items() if tensor is not None}
        sizes = {"pixels": images * height * width, "channels": channels, "threads": threads()}
        return cls(x=x.data_ptr(), **addresses, **sizes, eps=eps)


def forward(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Return y and, as ``(2, C)``, the mean and the biased variance of each channel.

    Args:
        x: ``(N, C, H, W)``, channels last, with two pixels or more; as all tensors, float32.
        weight, bias: ``(C,)``.
        residual: like x, in any layout, added before ReLU; or None.
        eps: added to the variance.
    """
    x, weight, bias = positive(x), numbers(weight), numbers(bias)
    added = None if residual is None else _images(residual)
    y, stats = torch.empty_like(x), x.new_empty(2, x.shape[1])
    call("sk_norm_forward", Norm.of(eps, x, weight=weight, bias=bias, residual=added, y=y, stats=stats))
    return y, stats


def backward(
    dy: Tensor, x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, stats: Tensor, eps: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return dx, the gradient of the residual, or None without one, and those of weight and bias as ``(2, C)``.

    Args:
        dy: like x, in any layout.
        x, weight, bias, stats, eps: of :func:`forward`.
        y: of :func:`forward` if there was a residual, else None: it is computed again.
    """
    dy, x, weight, bias = _images(dy), positive(x), numbers(weight), numbers(bias)
    dx, grads = torch.empty_like(x), torch.empty_like(stats)
    added = None if y is None else torch.empty_like(x)
    read = {"dy": dy, "y": y, "weight": weight, "bias": bias, "stats": stats}
    call("sk_norm_backward", Norm.of(eps, x, **read, dx=dx, grads=grads, residual_grad=added))
    return dx, added, grads


def _images(x: Tensor) -> Tensor:
    return positive(x).contiguous(memory_format=torch.channels_last)
