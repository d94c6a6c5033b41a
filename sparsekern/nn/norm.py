"""Batch norm and ReLU in one pass, for networks that are trained on a CPU."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from sparsekern.ops import batch_norm_relu, fuses_batch_norm_relu


def norm_relu(norm: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """Return ``relu(norm(x) + residual)``.

    In training on a CPU, a :class:`torch.nn.BatchNorm2d` of float32 images, channels last, is computed together with
    the residual and ReLU, which takes about two thirds of the time; its running statistics are updated as PyTorch
    does. Everything else (another norm, another device or dtype, evaluation, a norm with hooks, compiled code) is
    computed by PyTorch, one operation after the other.

    Args:
        norm: the norm; a :class:`torch.nn.SyncBatchNorm` or any other module does, too.
        x: ``(N, C, H, W)``.
        residual: like x, or None.

    Example:
        >>> import sparsekern as sk
        >>> conv, norm = sk.SparseConv2d(64, 64, 3, padding=1, block_size=16), nn.BatchNorm2d(64)
        >>> x = torch.randn(8, 64, 16, 16).contiguous(memory_format=torch.channels_last)
        >>> sk.nn.norm_relu(norm, conv(x), residual=x).shape
        torch.Size([8, 64, 16, 16])
    """
    if (
        type(norm) is nn.BatchNorm2d
        and norm.training
        and norm.affine
        and not _has_hooks(norm)
        and fuses_batch_norm_relu(x, norm.weight, norm.bias, residual)
    ):
        y, mean, variance = batch_norm_relu(x, norm.weight, norm.bias, residual, norm.eps)
        _track(norm, mean, variance, x.numel() // x.shape[1])
        return y
    y = norm(x)
    if residual is not None:
        y = y + residual if y is x else y.add_(residual)  # nn.Identity returns x, which stays as it is
    return F.relu(y, inplace=y is not x)


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _track(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, pixels: int) -> None:
    """Update the running statistics, if there are any."""
    if not norm.track_running_stats or norm.running_mean is None or norm.running_var is None:
        return
    share = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if share is None:
            share = 1 / float(norm.num_batches_tracked)
    share = share or 0.0
    norm.running_mean.mul_(1 - share).add_(mean, alpha=share)
    norm.running_var.mul_(1 - share).add_(variance, alpha=share * pixels / (pixels - 1))
