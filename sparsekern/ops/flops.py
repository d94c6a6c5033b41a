"""FLOP formulas, so that :class:`torch.utils.flop_counter.FlopCounterMode` counts stored elements only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

import sparsekern.ops.conv2d
import sparsekern.ops.linear  # noqa: F401  the ops must be defined before their formulas
from sparsekern.kernels.contract import Index
from sparsekern.ops.shapes import unpack_shape
from sparsekern.topology import Grid, conv_grid


def stored_elements(index: Index, grid: Grid) -> int:
    """Return the elements of the stored blocks that are inside the matrix.

    Without data (fake tensors) the blocks' places are unknown: every slot counts, whole.
    """
    if isinstance(index.row_ptr, FakeTensor) or index.row_ptr.is_meta:
        return index.slots * grid.block[0] * grid.block[1]
    (bo, bi), used = grid.block, int(index.row_ptr[-1])
    if not grid.has_edge:
        return used * bo * bi
    # Elements stick out below the last block row of each group, right of the last block column of each tap, and both.
    below, right = grid.group_rows * bo - grid.group_out, grid.tap_cols * bi - grid.tap_in
    bottom = torch.arange(grid.group_rows - 1, grid.rows, grid.group_rows, device=index.row_ptr.device)
    first, end = index.row_ptr[bottom], index.row_ptr[bottom + 1]
    in_bottom = end - first
    last = slice(grid.tap_cols - 1, None, grid.tap_cols)
    in_last = int(index.col_ptr.diff()[last].sum())
    in_both = 0
    if below and right:  # blocks are larger than 1x1, so the lists of columns are by entry
        before = in_bottom.cumsum(0) - in_bottom
        entry = torch.arange(int(in_bottom.sum()), device=first.device) + (first - before).repeat_interleave(in_bottom)
        in_both = int((index.row_col[entry] % grid.tap_cols == grid.tap_cols - 1).sum())
    return used * bo * bi - below * bi * int(in_bottom.sum()) - right * bo * in_last + below * right * in_both


def _flops(tokens: int, index: Any, block: tuple[int, int], out_features: int, in_features: int) -> int:
    return 2 * tokens * stored_elements(Index(*index), Grid(out_features, in_features, block))


@register_flop_formula(torch.ops.sparsekern.linear, get_raw=True)
def _linear(x: Tensor, values: Tensor, bias: Any, index: Any, out_features: int, *_: Any, **__: Any) -> int:
    return _flops(x.shape[0], index, (values.shape[1], values.shape[2]), out_features, x.shape[1])


@register_flop_formula(torch.ops.sparsekern.linear_dx, get_raw=True)
def _linear_dx(dy: Tensor, values: Tensor, index: Any, in_features: int, *_: Any, **__: Any) -> int:
    return _flops(dy.shape[0], index, (values.shape[1], values.shape[2]), dy.shape[1], in_features)


@register_flop_formula(torch.ops.sparsekern.linear_dvalues, get_raw=True)
def _linear_dvalues(dy: Tensor, x: Tensor, index: Any, bo: int, bi: int, *_: Any, **__: Any) -> int:
    return _flops(x.shape[0], index, (bo, bi), dy.shape[1], x.shape[1])


@register_flop_formula(torch.ops.sparsekern.linear_backward, get_raw=True)
def _linear_backward(dy: Tensor, x: Tensor, values: Tensor, index: Any, *_: Any, **__: Any) -> int:
    block = (values.shape[1], values.shape[2])
    return 2 * _flops(x.shape[0], index, block, dy.shape[1], x.shape[1])


@register_flop_formula(torch.ops.sparsekern.linear_block_norms, get_raw=True)
def _linear_block_norms(dy: Tensor, x: Tensor, row: Tensor, col: Tensor, bo: int, bi: int, *_: Any, **__: Any) -> int:
    return 2 * x.shape[0] * row.shape[0] * bo * bi


@register_flop_formula(torch.ops.sparsekern.linear_all_block_norms, get_raw=True)
def _linear_all_block_norms(dy: Tensor, x: Tensor, *_: Any, **__: Any) -> int:
    return 2 * x.shape[0] * dy.shape[1] * x.shape[1]


@register_flop_formula(torch.ops.sparsekern.linear_sketch, get_raw=True)
def _linear_sketch(dy: Tensor, x: Tensor, u: Tensor, v: Tensor, bo: int, bi: int, *_: Any, **__: Any) -> int:
    cells = -(-dy.shape[1] // bo) * -(-x.shape[1] // bi)
    return 2 * x.shape[0] * u.shape[0] * (dy.shape[1] + x.shape[1] + cells)


# As PyTorch counts a convolution: every output pixel sees all its taps, also those in the padding.


def _conv_flops(pixels: int, index: Any, block: tuple[int, int], shape: list[int]) -> int:
    sizes = unpack_shape(shape)
    grid = conv_grid(sizes.in_channels, sizes.out_channels, sizes.kernel, block, sizes.groups)
    return 2 * pixels * stored_elements(Index(*index), grid)


def _pixels(y: Tensor) -> int:
    return y.shape[0] * y.shape[2] * y.shape[3]


@register_flop_formula(torch.ops.sparsekern.conv2d, get_raw=True)
def _conv2d(
    x: Tensor, values: Tensor, bias: Any, index: Any, shape: list[int], *_: Any, out_val: Tensor, **__: Any
) -> int:
    return _conv_flops(_pixels(out_val), index, (values.shape[1], values.shape[2]), shape)


@register_flop_formula(torch.ops.sparsekern.conv2d_dx, get_raw=True)
def _conv2d_dx(dy: Tensor, values: Tensor, index: Any, shape: list[int], *_: Any, **__: Any) -> int:
    return _conv_flops(_pixels(dy), index, (values.shape[1], values.shape[2]), shape)


@register_flop_formula(torch.ops.sparsekern.conv2d_dvalues, get_raw=True)
def _conv2d_dvalues(dy: Tensor, x: Tensor, index: Any, bo: int, bi: int, shape: list[int], *_: Any, **__: Any) -> int:
    return _conv_flops(_pixels(dy), index, (bo, bi), shape)


@register_flop_formula(torch.ops.sparsekern.conv2d_backward, get_raw=True)
def _conv2d_backward(dy: Tensor, x: Tensor, values: Tensor, index: Any, shape: list[int], *_: Any, **__: Any) -> int:
    return 2 * _conv_flops(_pixels(dy), index, (values.shape[1], values.shape[2]), shape)


@register_flop_formula(torch.ops.sparsekern.conv2d_block_norms, get_raw=True)
def _conv2d_block_norms(dy: Tensor, x: Tensor, row: Tensor, col: Tensor, bo: int, bi: int, *_: Any, **__: Any) -> int:
    return 2 * _pixels(dy) * row.shape[0] * bo * bi


@register_flop_formula(torch.ops.sparsekern.conv2d_all_block_norms, get_raw=True)
def _conv2d_all_block_norms(dy: Tensor, x: Tensor, bo: int, bi: int, shape: list[int], *_: Any, **__: Any) -> int:
    sizes = unpack_shape(shape)
    return 2 * _pixels(dy) * sizes.out_channels * sizes.group_in * sizes.taps


@register_flop_formula(torch.ops.sparsekern.conv2d_sketch, get_raw=True)
def _conv2d_sketch(
    dy: Tensor, x: Tensor, u: Tensor, v: Tensor, bo: int, bi: int, shape: list[int], *_: Any, **__: Any
) -> int:
    sizes = unpack_shape(shape)
    cells = sizes.groups * sizes.block_rows(bo) * sizes.taps * sizes.block_cols(bi)
    features = sizes.out_channels + sizes.taps * sizes.in_channels
    return 2 * _pixels(dy) * u.shape[0] * (features + cells)
