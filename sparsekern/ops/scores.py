"""Scores of the blocks of a linear layer's gradient ``G = dy' x``, which is never formed.

Each op runs on the backend it is given by name; ``"auto"`` takes the fastest that can.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsekern.kernels.contract import accumulate_dtype
from sparsekern.ops.backends import backend_for
from sparsekern.ops.library import below_autograd, define, wants_grad


class _NotDifferentiable(torch.autograd.Function):
    """Scores choose blocks; a gradient through the choice has no meaning, and zero would be a silent lie."""

    @staticmethod
    def forward(ctx: Any, op: Callable[..., Tensor], dy: Tensor, x: Tensor, *args: Any) -> Tensor:
        return below_autograd(op, dy, x, *args)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError("block scores are not differentiable; detach them, or use the candidates' gradients")


def autograd_kernel(name: str) -> Any:
    """Return what runs at the Autograd key of a score op ``name(dy, x, ...)``: its gradient raises."""

    def kernel(dy: Tensor, x: Tensor, *args: Any) -> Tensor:
        op: Callable[..., Tensor] = getattr(torch.ops.sparsekern, name).default
        if wants_grad(dy, x):
            result: Tensor = _NotDifferentiable.apply(op, dy, x, *args)
            return result
        return below_autograd(op, dy, x, *args)

    return kernel


def _run_block_norms(dy: Tensor, x: Tensor, row: Tensor, col: Tensor, bo: int, bi: int, backend: str) -> Tensor:
    chosen = backend_for(backend, "linear", x, (bo, bi))
    return chosen.block_norms(dy, x, row, col, (bo, bi))


def _run_all_block_norms(dy: Tensor, x: Tensor, bo: int, bi: int, backend: str) -> Tensor:
    return backend_for(backend, "linear", x, (bo, bi)).all_block_norms(dy, x, (bo, bi))


def _run_sketch(dy: Tensor, x: Tensor, u: Tensor, v: Tensor, bo: int, bi: int, backend: str) -> Tensor:
    return backend_for(backend, "linear", x, (bo, bi)).sketch(dy, x, u, v, (bo, bi))


def _fake_block_norms(dy: Tensor, x: Tensor, row: Tensor, *_: Any) -> Tensor:
    return x.new_empty(row.shape[0], dtype=accumulate_dtype(x.dtype))


def _fake_all_block_norms(dy: Tensor, x: Tensor, bo: int, bi: int, backend: str) -> Tensor:
    return x.new_empty(_cells(dy, bo), _cells(x, bi), dtype=accumulate_dtype(x.dtype))


def _fake_sketch(dy: Tensor, x: Tensor, u: Tensor, v: Tensor, bo: int, bi: int, backend: str) -> Tensor:
    return x.new_empty(u.shape[0], _cells(dy, bo), _cells(x, bi), dtype=accumulate_dtype(x.dtype))


def _cells(x: Tensor, side: int) -> int:
    return (x.shape[1] + side - 1) // side


block_norms: Callable[..., Tensor] = define(
    "linear_block_norms",
    "(Tensor dy, Tensor x, Tensor row, Tensor col, SymInt bo, SymInt bi, str backend) -> Tensor",
    fake=_fake_block_norms,
    run=_run_block_norms,
    autograd=autograd_kernel("linear_block_norms"),
)
"""Frobenius norms ``(K,)`` of the blocks ``(row[k], col[k])``; float32 (float64 for float64)."""

all_block_norms: Callable[..., Tensor] = define(
    "linear_all_block_norms",
    "(Tensor dy, Tensor x, SymInt bo, SymInt bi, str backend) -> Tensor",
    fake=_fake_all_block_norms,
    run=_run_all_block_norms,
    autograd=autograd_kernel("linear_all_block_norms"),
)
"""Frobenius norms ``(R, C)`` of all blocks; float32 (float64 for float64)."""

sketch: Callable[..., Tensor] = define(
    "linear_sketch",
    "(Tensor dy, Tensor x, Tensor u, Tensor v, SymInt bo, SymInt bi, str backend) -> Tensor",
    fake=_fake_sketch,
    run=_run_sketch,
    autograd=autograd_kernel("linear_sketch"),
)
"""``u[q]' G v[q]`` of every block, ``(r, R, C)``; float32 (float64 for float64)."""
