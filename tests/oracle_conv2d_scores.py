"""What the kernels for the scores of a convolution must compute; beside :mod:`tests.oracle_conv2d`."""

from __future__ import annotations

import torch
from sparsekern.kernels.contract import accumulate_dtype
from torch import Tensor

from tests.oracle import F64, assert_within
from tests.oracle_conv2d import ConvCase, conv_blocks, dense_gradients


def all_conv_cells(case: ConvCase) -> tuple[Tensor, Tensor]:
    keys = torch.arange(case.grid.cells, dtype=torch.int32)
    return keys // case.grid.cols, keys % case.grid.cols


def gradient_blocks(dy: Tensor, x: Tensor, case: ConvCase) -> Tensor:
    """Return the gradient of the whole weight as ``(R * C, bo, bi)``, in the dtype of dy and x."""
    _, gradient = dense_gradients(dy, x, torch.zeros_like(case.weight, dtype=x.dtype), case.shape)
    return conv_blocks(gradient, *all_conv_cells(case), case.grid.block, case.shape)


def check_conv_norms(case: ConvCase, norms: Tensor, products: float = 0.0) -> None:
    """Raise AssertionError unless ``norms`` are those of all blocks; see :func:`tests.oracle_scores.check_norms`."""
    dy, x, dtype = case.dy.to(F64), case.x.to(F64), accumulate_dtype(case.x.dtype)
    exact = gradient_blocks(dy, x, case).norm(dim=(1, 2))
    magnitude = gradient_blocks(dy.abs(), x.abs(), case).norm(dim=(1, 2))
    peer = gradient_blocks(case.dy.to(dtype), case.x.to(dtype), case).norm(dim=(1, 2))
    pixels = dy.shape[0] * dy.shape[2] * dy.shape[3]
    terms = torch.tensor(float(pixels + case.grid.block[0] * case.grid.block[1]))
    assert_within("norms", norms.flatten(), exact, peer, magnitude, terms, dtype, products=products)


def check_conv_sketch(case: ConvCase, sketch: Tensor, u: Tensor, v: Tensor, products: float = 0.0) -> None:
    """Raise AssertionError unless ``sketch (r, R, C)`` is ``u' G v`` of every block."""
    grid, dtype = case.grid, accumulate_dtype(case.x.dtype)

    def of(dy: Tensor, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        cells = all_conv_cells(case)
        _, gradient = dense_gradients(dy, x, torch.zeros_like(case.weight, dtype=x.dtype), case.shape)
        scaled = []
        for a, b in zip(u, v, strict=True):
            by_tap = b.view(1, *case.shape.kernel, -1).permute(0, 3, 1, 2)
            whole = gradient * a.view(-1, 1, 1, 1) * by_tap
            scaled.append(conv_blocks(whole, *cells, grid.block, case.shape).sum((1, 2)))
        return torch.stack(scaled).view(-1, grid.rows, grid.cols)

    dy, x, u64, v64 = case.dy.to(F64), case.x.to(F64), u.to(F64), v.to(F64)
    pixels = dy.shape[0] * dy.shape[2] * dy.shape[3]
    terms = torch.tensor(float(pixels + sum(grid.block)))  # two inner products, then the sum over pixels
    magnitude = of(dy.abs(), x.abs(), u64.abs(), v64.abs())
    peer = of(case.dy.to(dtype), case.x.to(dtype), u.to(dtype), v.to(dtype))
    assert_within("sketch", sketch, of(dy, x, u64, v64), peer, magnitude, terms, dtype, products=products)
