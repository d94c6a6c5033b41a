"""Softmax attention of one tensor of queries, keys and values on the native library."""

from __future__ import annotations

import ctypes

import torch
from sparsekern.kernels.cpu.library import call, numbers, threads
from torch import Tensor

POINTERS = ("qkv", "dy", "y", "dqkv", "stats")
SIZES = ("batch", "tokens", "heads", "features", "causal", "threads")


class Attention(ctypes.Structure):
    """``AttentionCall`` of ``csrc/api.h``. It holds addresses: keep the tensors until the call is over."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in SIZES),
        ("scale", ctypes.c_double),
    )

    @classmethod
    def of(cls, heads: int, is_causal: bool, qkv: Tensor, **tensors: Tensor) -> Attention:
        """Describe a call on ``qkv (N, tokens, 3 * heads * features)``; all tensors are contiguous float32."""
        batch, tokens, width = qkv.shape
        features = width // (3 * heads)
        addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        sizes = dict(zip(SIZES, (batch, tokens, heads, features, is_causal, threads()), strict=True))
        return cls(qkv=qkv.data_ptr(), **addresses, **sizes, scale=features**-0.5)


def forward(qkv: Tensor, heads: int, is_causal: bool) -> tuple[Tensor, Tensor]:
    """Return y ``(N, tokens, heads * features)`` and ``(2, N, heads, tokens)`` for the backward: see ``csrc/api.h``.

    Args:
        qkv: ``(N, tokens, 3 * heads * features)``, float32: queries, keys and values, each with its heads one
            after the other. ``features`` is a multiple of :data:`FEATURES`.
        heads: number of heads.
        is_causal: whether a token attends only to itself and those before it.
    """
    qkv = numbers(qkv)
    batch, tokens, width = qkv.shape
    y, stats = qkv.new_empty(batch, tokens, width // 3), qkv.new_empty(2, batch, heads, tokens)
    call("sk_attention", Attention.of(heads, is_causal, qkv, y=y, stats=stats))
    return y, stats


def backward(dy: Tensor, qkv: Tensor, stats: Tensor, heads: int, is_causal: bool) -> Tensor:
    """Return the gradient of qkv.

    Args:
        dy: like y, in any layout.
        qkv, stats, heads, is_causal: of :func:`forward`.
    """
    dy, qkv = numbers(dy), numbers(qkv)
    dqkv = torch.empty_like(qkv)
    call("sk_attention", Attention.of(heads, is_causal, qkv, dy=dy, dqkv=dqkv, stats=stats))
    return dqkv


FEATURES = 32
"""Divisor of the number of features of a head: two of the widest vectors."""
