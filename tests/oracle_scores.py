"""What the kernels for scores must compute, from the dense float64 gradient; beside :mod:`tests.oracle`."""

from __future__ import annotations

import torch
from sparsekern.kernels.contract import accumulate_dtype
from torch import Tensor

from tests.oracle import F64, Case, assert_within, stored_blocks


def all_cells(case: Case) -> tuple[Tensor, Tensor]:
    keys = torch.arange(case.grid.cells, dtype=torch.int32)
    return keys // case.grid.cols, keys % case.grid.cols


def gradient_blocks(dy: Tensor, x: Tensor, case: Case) -> Tensor:
    """Return ``dy' x`` as ``(R * C, bo, bi)``, in the dtype of dy and x."""
    return stored_blocks(dy.T @ x, *all_cells(case), case.grid.block)


def check_norms(case: Case, norms: Tensor) -> None:
    """Raise AssertionError unless ``norms`` are those of all blocks, within the tolerance of their elements.

    A norm moves by no more than the norm of what its elements move by, so the elements' tolerance, taken as blocks,
    bounds it; and it is itself a sum of ``bo * bi`` squares.
    """
    dy, x, dtype = case.dy.to(F64), case.x.to(F64), accumulate_dtype(case.x.dtype)
    exact = gradient_blocks(dy, x, case).norm(dim=(1, 2))
    magnitude = gradient_blocks(dy.abs(), x.abs(), case).norm(dim=(1, 2))
    peer = gradient_blocks(case.dy.to(dtype), case.x.to(dtype), case).norm(dim=(1, 2))
    terms = torch.tensor(float(case.x.shape[0] + case.grid.block[0] * case.grid.block[1]))
    assert_within("norms", norms.flatten(), exact, peer, magnitude, terms, dtype)


def check_sketch(case: Case, sketch: Tensor, u: Tensor, v: Tensor) -> None:
    """Raise AssertionError unless ``sketch (r, R, C)`` is ``u' G v`` of every block."""
    grid, dtype = case.grid, accumulate_dtype(case.x.dtype)

    def of(dy: Tensor, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        blocks = [gradient_blocks(dy * a, x * b, case).sum((1, 2)) for a, b in zip(u, v, strict=True)]
        return torch.stack(blocks).view(-1, grid.rows, grid.cols)

    dy, x, u64, v64 = case.dy.to(F64), case.x.to(F64), u.to(F64), v.to(F64)
    terms = torch.tensor(float(case.x.shape[0] + sum(grid.block)))  # two inner products, then the sum over tokens
    magnitude = of(dy.abs(), x.abs(), u64.abs(), v64.abs())
    peer = of(case.dy.to(dtype), case.x.to(dtype), u.to(dtype), v.to(dtype))
    assert_within("sketch", sketch, of(dy, x, u64, v64), peer, magnitude, terms, dtype)


def signs(count: int, features: int, seed: int) -> Tensor:
    """Return ``(count, features)`` of -1 and 1."""
    return torch.randint(2, (count, features), generator=torch.Generator().manual_seed(seed)).float() * 2 - 1
