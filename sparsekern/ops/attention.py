"""Softmax attention of one tensor of queries, keys and values, for training on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsekern.errors import InputError
from sparsekern.kernels.cpu import attention
from sparsekern.ops.backends import differentiates_natively, runs_natively
from sparsekern.ops.checks import check_storage
from sparsekern.ops.library import below_autograd, define


def qkv_attention(qkv: Tensor, heads: int, *, is_causal: bool = False) -> Tensor:
    """Compute :func:`torch.nn.functional.scaled_dot_product_attention` of the output of one linear layer.

    On a CPU, float32 with heads of 32, 64, 96 or 128 features is computed natively: no part of ``qkv`` or of its
    gradient is copied (a ``qkv`` that is not contiguous is, whole, in the forward and in the backward), and a short
    causal context takes about 60 % of the time. Everything else (another device or dtype, autocast, compiled or
    transformed code) is computed by PyTorch.

    Args:
        qkv: ``(N, tokens, 3 * heads * features)``: queries, keys and values, each with its heads one after the other.
        heads: of ``features`` each.
        is_causal: whether a token attends only to itself and those before it.

    Returns:
        ``(N, tokens, heads * features)``: the heads one after the other.

    Raises:
        ValueError: qkv has other dimensions, no whole number of features for each head, or a storage too small for it.

    Example:
        >>> import sparsekern as sk
        >>> qkv = sk.SparseLinear(128, 3 * 128, block_size=16)
        >>> sk.nn.qkv_attention(qkv(torch.randn(4, 10, 128)), heads=2, is_causal=True).shape
        torch.Size([4, 10, 128])
    """
    if isinstance(qkv, Tensor) and (qkv.dim() != 3 or heads < 1 or qkv.shape[2] % (3 * heads)):
        raise InputError(
            f"qkv is {tuple(qkv.shape)} for {heads} heads; it must be (N, tokens, 3 * heads * features)",
            parameter="qkv",
        )
    if _is_native(qkv, heads):
        y: Tensor = _forward(qkv, heads, is_causal)[0]
        return y
    q, k, v = _split(qkv, heads)
    return _joined(F.scaled_dot_product_attention(q, k, v, is_causal=is_causal))


def _is_native(qkv: Tensor, heads: int) -> bool:
    return (
        runs_natively(qkv, is_op=True)
        and qkv.numel() > 0
        and qkv.shape[2] % (3 * heads * attention.FEATURES) == 0
        and qkv.shape[2] <= 3 * heads * MOST_FEATURES
        and qkv.shape[1] <= MOST_TOKENS
        and not torch.is_autocast_enabled("cpu")
    )


MOST_FEATURES = 128
"""Largest number of features of a head that is computed natively; wider heads have not been measured."""

MOST_TOKENS = 4096
"""Longest text that is computed natively.

A thread reads all keys and values of a head; PyTorch reads those of longer texts in pieces that fit the caches.
"""


def _split(qkv: Tensor, heads: int) -> Tensor:
    """Return queries, keys and values as ``(3, N, heads, tokens, features)``."""
    parts: Tensor = qkv.unflatten(2, (3, heads, -1))
    return parts.permute(2, 0, 3, 1, 4)


def _joined(y: Tensor) -> Tensor:
    return y.transpose(1, 2).flatten(2)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int, is_causal: bool) -> tuple[Tensor, Tensor]:
        y, stats = below_autograd(_forward, qkv, heads, is_causal)
        ctx.save_for_backward(qkv, stats)
        ctx.given = heads, is_causal
        ctx.mark_non_differentiable(stats)
        return y, stats

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Any) -> Any:
        qkv, stats = ctx.saved_tensors
        heads, is_causal = ctx.given
        if not differentiates_natively(dy, is_op=True):
            return _composed_backward(dy, qkv, heads, is_causal), None, None
        return below_autograd(_backward, dy, qkv, stats, heads, is_causal), None, None


def _fake_forward(qkv: Tensor, heads: int, is_causal: bool) -> tuple[Tensor, Tensor]:
    batch, tokens, width = qkv.shape
    return qkv.new_empty(batch, tokens, width // 3), qkv.new_empty(2, batch, heads, tokens)


def _check(qkv: Tensor, heads: int) -> None:
    """Raise ValueError if the kernels cannot read a tensor; :func:`qkv_attention` calls the op with others never."""
    width = 3 * heads * attention.FEATURES
    if heads < 1 or not _is_plain(qkv) or qkv.dim() != 3 or not qkv.numel() or qkv.shape[2] % width:
        raise InputError(
            f"qkv is {qkv.dtype} {tuple(qkv.shape)} on {qkv.device} for {heads} heads; the op takes float32 "
            f"(N, tokens, 3 * heads * features) on a CPU, with features a multiple of {attention.FEATURES}",
            parameter="qkv",
        )
    check_storage(qkv)


def _is_plain(tensor: Tensor) -> bool:
    return tensor.is_cpu and tensor.dtype is torch.float32


def _run_forward(qkv: Tensor, heads: int, is_causal: bool) -> tuple[Tensor, Tensor]:
    _check(qkv, heads)
    return attention.forward(qkv, heads, is_causal)


def _run_backward(dy: Tensor, qkv: Tensor, stats: Tensor, heads: int, is_causal: bool) -> Tensor:
    _check(qkv, heads)
    batch, tokens, width = qkv.shape
    given, right = (dy.shape, stats.shape), ((batch, tokens, width // 3), (2, batch, heads, tokens))
    if given != right or not (_is_plain(dy) and _is_plain(stats)):
        raise InputError(f"dy and stats are {tuple(map(tuple, given))}; they must be float32 of {right} on a CPU")
    check_storage(dy, stats)
    return attention.backward(dy, qkv, stats, heads, is_causal)


_forward: Callable[..., tuple[Tensor, Tensor]] = define(
    "qkv_attention",
    "(Tensor qkv, int heads, bool is_causal) -> (Tensor, Tensor)",
    fake=_fake_forward,
    run=_run_forward,
    autograd=_Attention.apply,
)

_backward: Callable[..., Tensor] = define(
    "qkv_attention_backward",
    "(Tensor dy, Tensor qkv, Tensor stats, int heads, bool is_causal) -> Tensor",
    fake=lambda dy, qkv, *_: qkv.new_empty(qkv.shape),
    run=_run_backward,
    autograd=lambda *given: below_autograd(_backward, *given),
)


def _composed_backward(dy: Tensor, qkv: Tensor, heads: int, is_causal: bool) -> Tensor:
    """Return the gradient of qkv by ops that can be differentiated and mapped, which PyTorch's fused one cannot."""
    (q, k, v), g = _split(qkv, heads), dy.reshape(*dy.shape[:2], heads, -1).transpose(1, 2)
    scale = q.shape[-1] ** -0.5
    scores = scale * q @ k.transpose(-1, -2)
    if is_causal:
        later = q.new_ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    p = scores.softmax(-1)
    dp = g @ v.transpose(-1, -2)
    ds = scale * p * (dp - (p * dp).sum(-1, keepdim=True))
    parts = torch.stack((ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ g))
    return parts.permute(1, 3, 0, 2, 4).reshape(qkv.shape)
