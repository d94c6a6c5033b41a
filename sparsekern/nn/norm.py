"""Norm layers: batch norm and ReLU in one pass, on a CPU; and the running statistics of a model's norms."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import _has_any_global_hook

from sparsekern.errors import InputError
from sparsekern.nn.surgery import restored
from sparsekern.ops import batch_norm_relu, fuses_batch_norm_relu
from sparsekern.topology.arguments import check_kind


def norm_relu(norm: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """Return ``relu(norm(x) + residual)``.

    In training on a CPU, a :class:`torch.nn.BatchNorm2d` of float32 images, channels last, is computed together with
    the residual and ReLU, which takes about two thirds of the time; its running statistics are updated as PyTorch
    does. Everything else (another norm, another device or dtype, evaluation, a norm with hooks, hooks of all modules,
    compiled code) is computed by PyTorch, one operation after the other.

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
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(own or _has_any_global_hook())


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


@contextmanager
def keep_norm_statistics(model: nn.Module) -> Iterator[None]:
    """Restore the running statistics of batch and instance norms at the end.

    Must not enclose a forward whose backward comes after the context.
    """
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.training and m.track_running_stats]
    with restored(buffer for norm in norms for buffer in norm.buffers()):
        yield


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
