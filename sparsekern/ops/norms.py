"""Batch norm, an added residual and ReLU as one op, for training on a CPU: fewer passes over memory than one by one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsekern.kernels.cpu import norms
from sparsekern.ops.backends import differentiates_natively, runs_natively
from sparsekern.ops.checks import check_storage

SMALL = 2**16
"""Number of elements below which PyTorch's own ops are faster."""


def fuses_batch_norm_relu(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> bool:
    """Return whether :func:`batch_norm_relu` takes these tensors.

    Args:
        x: ``(N, C, H, W)``; float32 on a CPU, channels last, and at least :data:`SMALL` elements.
        weight, bias: ``(C,)``, float32.
        residual: like x, or None.
    """
    return (
        runs_natively(x, weight, bias, residual)
        and x.dim() == 4
        and x.numel() >= SMALL
        and x.numel() > x.shape[1]  # one element a channel has no variance, which PyTorch refuses
        and x.is_contiguous(memory_format=torch.channels_last)
        and weight.shape == bias.shape == x.shape[1:2]
        and (residual is None or residual.shape == x.shape)
    )


def batch_norm_relu(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise images by their own mean and variance, add a residual, and apply ReLU.

    Call it with what :func:`fuses_batch_norm_relu` accepts.

    Args:
        x: ``(N, C, H, W)``, channels last.
        weight, bias: ``(C,)``, of each channel.
        residual: like x, or None.
        eps: added to the variance.

    Returns:
        y like x; the mean and the biased variance of each channel, ``(C,)``, which have no gradient.

    Raises:
        ValueError: the storage of a tensor was resized and is too small for it.
    """
    y, stats = _BatchNormReLU.apply(x, weight, bias, residual, eps)
    mean, variance = stats.unbind()
    return y, mean, variance


class _BatchNormReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        check_storage(x, weight, bias, residual)
        y, stats = norms.forward(x, weight, bias, residual, eps)
        # without a residual the backward computes the sign of y from x again
        ctx.save_for_backward(x, None if residual is None else y, weight, bias, stats)
        ctx.eps = eps
        ctx.mark_non_differentiable(stats)
        return y, stats

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Any) -> Any:
        x, y, weight, bias, stats = ctx.saved_tensors
        if not differentiates_natively(dy):
            return *_composed_backward(dy, x, y, weight, bias, ctx.eps), None
        check_storage(dy, x, y, weight, bias)
        dx, added, grads = norms.backward(dy, x, y, weight, bias, stats, ctx.eps)
        return dx, grads[0], grads[1], added, None


def _composed_backward(
    dy: Tensor, x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of x, weight, bias and the residual by ops that can be differentiated and mapped."""
    pixels = (0, 2, 3)
    centred = x - x.mean(pixels, keepdim=True)
    scale = (centred.square().mean(pixels, keepdim=True) + eps).rsqrt()
    normed, weight = centred * scale, weight[:, None, None]
    g = dy.masked_fill((normed * weight + bias[:, None, None] if y is None else y) <= 0, 0)
    of_normed = g * normed
    dx = weight * scale * (g - g.mean(pixels, keepdim=True) - normed * of_normed.mean(pixels, keepdim=True))
    return dx, of_normed.sum(pixels), g.sum(pixels), None if y is None else g
