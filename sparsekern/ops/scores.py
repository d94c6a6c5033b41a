"""Scores of the blocks of a weight's gradient ``G = dy' x``, which is never formed whole.

Each op is registered for both geometries, as ``linear_block_norms``, ``conv2d_block_norms`` and so on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsekern.kernels.contract import Geometry, LinearShape, accumulate_dtype
from sparsekern.ops.backends import kernels_for
from sparsekern.ops.library import below_autograd, channels_last, define, pack, unpack, wants_grad


def block_norms(
    dy: Tensor, x: Tensor, row: Tensor, col: Tensor, bo: int, bi: int, backend: str, geometry: Geometry | None = None
) -> Tensor:
    """Return the Frobenius norms ``(K,)`` of the blocks ``(row[k], col[k])``: float32, or float64 for float64.

    Args:
        dy: ``(T, O)``, or images ``(N, Cout, Ho, Wo)``.
        x: ``(T, I)``, or images ``(N, Cin, H, W)``.
        row, col: ``(K,)``, the places.
        bo, bi: rows and columns of a block.
        backend: its name, or ``"auto"`` for the fastest that can.
        geometry: of a convolution; None for a linear layer with these dy and x.
    """
    return _score("block_norms", dy, x, (row, col), (bo, bi), backend, geometry)


def all_block_norms(dy: Tensor, x: Tensor, bo: int, bi: int, backend: str, geometry: Geometry | None = None) -> Tensor:
    """Return the Frobenius norms ``(R, C)`` of all blocks.

    Args:
        dy, x, bo, bi, backend, geometry: as in :func:`block_norms`.
    """
    return _score("all_block_norms", dy, x, (), (bo, bi), backend, geometry)


def sketch(
    dy: Tensor, x: Tensor, u: Tensor, v: Tensor, bo: int, bi: int, backend: str, geometry: Geometry | None = None
) -> Tensor:
    """Return ``u[q]' G v[q]`` of every block, ``(r, R, C)``.

    Args:
        u: ``(r, O)``; of a convolution ``(r, Cout)``.
        v: ``(r, I)``; of a convolution ``(r, kh * kw * Cin / groups)``.
        dy, x, bo, bi, backend, geometry: as in :func:`block_norms`.
    """
    return _score("sketch", dy, x, (u, v), (bo, bi), backend, geometry)


def _score(
    name: str,
    dy: Tensor,
    x: Tensor,
    more: tuple[Tensor, ...],
    block: tuple[int, int],
    backend: str,
    geometry: Geometry | None,
) -> Tensor:
    geometry = geometry or LinearShape(x.shape[1], dy.shape[1])
    op: Callable[..., Tensor] = getattr(torch.ops.sparsekern, f"{geometry.op}_{name}").default
    return op(dy, x, *more, *block, pack(geometry), backend)


class _NotDifferentiable(torch.autograd.Function):
    """Scores choose blocks: a gradient through the choice has no meaning, and zeros would be wrong without a word."""

    @staticmethod
    def forward(ctx: Any, op: Callable[..., Tensor], *args: Any) -> Tensor:
        return below_autograd(op, *args)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError("block scores are not differentiable; detach them, or use the candidates' gradients")


def _shape(name: str, more: tuple[Any, ...], cells: tuple[int, int]) -> tuple[int, ...]:
    """Return the shape of a score, given the tensors it takes beside dy and x, and ``(R, C)``."""
    if name == "block_norms":
        return (more[0].shape[0],)
    return cells if name == "all_block_norms" else (more[0].shape[0], *cells)


def _define(op: str, name: str, tensors: str, sizes: str) -> None:
    """Register a score op of a geometry; ``tensors`` are those that it takes beside dy and x."""

    def run(dy: Tensor, x: Tensor, *rest: Any) -> Tensor:
        *more, bo, bi, numbers, backend = rest
        geometry = unpack(numbers)
        kernel = getattr(kernels_for(backend, geometry, x, (bo, bi)), name)
        score: Tensor = kernel(channels_last(dy), channels_last(x), *more, (bo, bi), geometry)
        return score

    def fake(dy: Tensor, x: Tensor, *rest: Any) -> Tensor:
        *more, bo, bi, numbers, _ = rest
        shape = _shape(name, tuple(more), unpack(numbers).cells((bo, bi)))
        return x.new_empty(shape, dtype=accumulate_dtype(x.dtype))

    def at_autograd(dy: Tensor, x: Tensor, *rest: Any) -> Tensor:
        if not wants_grad(dy, x):
            return below_autograd(registered, dy, x, *rest)
        score: Tensor = _NotDifferentiable.apply(registered, dy, x, *rest)
        return score

    schema = f"(Tensor dy, Tensor x, {tensors}SymInt bo, SymInt bi, {sizes}[] sizes, str backend) -> Tensor"
    registered = define(f"{op}_{name}", schema, fake=fake, run=run, autograd=at_autograd)


for _op, _sizes in (("linear", "SymInt"), ("conv2d", "int")):
    _define(_op, "block_norms", "Tensor row, Tensor col, ", _sizes)
    _define(_op, "all_block_norms", "", _sizes)
    _define(_op, "sketch", "Tensor u, Tensor v, ", _sizes)
