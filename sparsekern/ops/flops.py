"""FLOP formulas, so that :class:`torch.utils.flop_counter.FlopCounterMode` counts stored elements only.

As PyTorch counts a convolution, every output pixel sees all its taps, including those in the padding. The fused
attention of a CPU, which PyTorch's counter leaves out, is counted as that of a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import (
    flop_registry,
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

import sparsekern.ops.attention
import sparsekern.ops.products
import sparsekern.ops.scores  # noqa: F401  the ops must be defined before their formulas
from sparsekern.kernels.contract import ConvShape, Index
from sparsekern.ops.library import unpack
from sparsekern.topology import Grid, conv_grid


def stored_elements(index: Index, grid: Grid) -> int:
    """Return the elements of the stored blocks that are inside the matrix.

    Without data (fake tensors) the places of the blocks are unknown: every slot counts as a whole block.
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


def _grid(sizes: Sequence[int], block: Sequence[int]) -> Grid:
    geometry, sides = unpack(sizes), (block[0], block[1])
    if isinstance(geometry, ConvShape):
        given = geometry.in_channels, geometry.out_channels, geometry.kernel, sides, geometry.groups
        return conv_grid(*given)
    return Grid(geometry.out_features, geometry.in_features, sides)


def _tokens(y: Tensor) -> int:
    return math.prod(y.shape) // y.shape[1]


def _product(y: Tensor, index: Sequence[Tensor], sizes: Sequence[int], block: Sequence[int]) -> int:
    return 2 * _tokens(y) * stored_elements(Index(*index), _grid(sizes, block))


def _forward(x: Tensor, values: Tensor, bias: Any, index: Any, sizes: Any, *_: Any, out_val: Tensor, **__: Any) -> int:
    return _product(out_val, index, sizes, values.shape[1:])


def _dx(dy: Tensor, values: Tensor, index: Any, sizes: Any, *_: Any, **__: Any) -> int:
    return _product(dy, index, sizes, values.shape[1:])


def _dvalues(dy: Tensor, x: Tensor, index: Any, bo: int, bi: int, sizes: Any, *_: Any, **__: Any) -> int:
    return _product(dy, index, sizes, (bo, bi))


def _backward(dy: Tensor, x: Tensor, values: Tensor, index: Any, sizes: Any, *_: Any, **__: Any) -> int:
    return 2 * _product(dy, index, sizes, values.shape[1:])


def _block_norms(dy: Tensor, x: Tensor, row: Tensor, col: Tensor, bo: int, bi: int, *_: Any, **__: Any) -> int:
    return 2 * _tokens(dy) * row.shape[0] * bo * bi


def _all_block_norms(dy: Tensor, x: Tensor, bo: int, bi: int, sizes: Any, *_: Any, **__: Any) -> int:
    grid = _grid(sizes, (bo, bi))
    return 2 * _tokens(dy) * grid.out_features * grid.in_features


def _sketch(dy: Tensor, x: Tensor, u: Tensor, v: Tensor, bo: int, bi: int, sizes: Any, *_: Any, **__: Any) -> int:
    grid = _grid(sizes, (bo, bi))
    return 2 * _tokens(dy) * u.shape[0] * (grid.out_features + grid.groups * grid.in_features + grid.cells)


_FORMULAS: dict[str, Callable[..., int]] = {
    "": _forward,
    "_dx": _dx,
    "_dvalues": _dvalues,
    "_backward": _backward,
    "_block_norms": _block_norms,
    "_all_block_norms": _all_block_norms,
    "_sketch": _sketch,
}

for _op in ("linear", "conv2d"):
    for _suffix, _formula in _FORMULAS.items():
        register_flop_formula(getattr(torch.ops.sparsekern, _op + _suffix), get_raw=True)(_formula)


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(grad_out: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad_out, query, key, value))


for _name, _formula in (("", _attention), ("_backward", _attention_backward)):
    _attention_op = getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention_for_cpu{_name}")
    if _attention_op not in flop_registry:  # a second formula would raise
        register_flop_formula(_attention_op)(_formula)


def _qkv_attention(qkv: Any, heads: int, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(*[_head_shape(qkv, heads)] * 3))


def _qkv_attention_backward(dy: Any, qkv: Any, stats: Any, heads: int, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(*[_head_shape(qkv, heads)] * 4))


def _head_shape(qkv: Sequence[int], heads: int) -> tuple[int, ...]:
    """Return the shape of the queries: that of the keys and values too."""
    batch, tokens, width = qkv
    return batch, heads, tokens, width // 3 // heads


register_flop_formula(torch.ops.sparsekern.qkv_attention)(_qkv_attention)
register_flop_formula(torch.ops.sparsekern.qkv_attention_backward)(_qkv_attention_backward)
