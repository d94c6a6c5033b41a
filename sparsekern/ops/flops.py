"""FLOP formulas, so that :class:`torch.utils.flop_counter.FlopCounterMode` counts stored elements only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

import sparsekern.ops.linear  # noqa: F401  the ops must be defined before their formulas
from sparsekern.kernels.contract import Index, entry_columns, entry_rows


def stored_elements(index: Index, block: tuple[int, int], out_features: int, in_features: int) -> int:
    """Return the elements of the stored blocks that are inside the matrix.

    Without data (fake tensors) the blocks' places are unknown: every slot counts, whole.
    """
    bo, bi = block
    if isinstance(index.row_ptr, FakeTensor) or index.row_ptr.is_meta:
        return index.slots * bo * bi
    used = int(index.row_ptr[-1])
    # Rows from the column lists, columns from the row lists: matched up by slot.
    sizes = torch.zeros(2, index.slots, dtype=torch.int64, device=index.row_ptr.device)
    rows, cols = entry_rows(index, block, 0, used).long(), entry_columns(index, block, 0, used).long()
    sizes[0, index.col_slot[:used].long()] = (out_features - rows * bo).clamp(max=bo)
    sizes[1, index.row_slot[:used].long()] = (in_features - cols * bi).clamp(max=bi)
    return int((sizes[0] * sizes[1]).sum())


@register_flop_formula(torch.ops.sparsekern.linear, get_raw=True)
def _linear(x: Tensor, values: Tensor, bias: Any, index: Any, out_features: int, *_: Any, **__: Any) -> int:
    block = (values.shape[1], values.shape[2])
    return 2 * x.shape[0] * stored_elements(Index(*index), block, out_features, x.shape[1])


@register_flop_formula(torch.ops.sparsekern.linear_dx, get_raw=True)
def _linear_dx(dy: Tensor, values: Tensor, index: Any, in_features: int, *_: Any, **__: Any) -> int:
    block = (values.shape[1], values.shape[2])
    return 2 * dy.shape[0] * stored_elements(Index(*index), block, dy.shape[1], in_features)


@register_flop_formula(torch.ops.sparsekern.linear_dvalues, get_raw=True)
def _linear_dvalues(dy: Tensor, x: Tensor, index: Any, bo: int, bi: int, *_: Any, **__: Any) -> int:
    return 2 * x.shape[0] * stored_elements(Index(*index), (bo, bi), dy.shape[1], x.shape[1])


@register_flop_formula(torch.ops.sparsekern.linear_backward, get_raw=True)
def _linear_backward(dy: Tensor, x: Tensor, values: Tensor, index: Any, *_: Any, **__: Any) -> int:
    block = (values.shape[1], values.shape[2])
    return 4 * x.shape[0] * stored_elements(Index(*index), block, dy.shape[1], x.shape[1])


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
