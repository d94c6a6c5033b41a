"""The block-sparse convolution on Triton. Axes and edge cases: :mod:`sparsekern.kernels.contract`.

These functions choose a configuration and launch; they check nothing. What they hold beside inputs and outputs:

    x, dy     a copy, if the channels of a group are no multiple of 16 bytes
    values    as in :mod:`sparsekern.kernels.gpu.linear`
    dx        the lists of blocks by phase: 8 bytes a block (:mod:`sparsekern.kernels.gpu.conv2d_lists`)
    dvalues   a float32 workspace of all blocks for each split of the pixels, if blocks are too few for the device
"""

from __future__ import annotations

import torch
import triton
from sparsekern.kernels.contract import PADDING, ConvShape, Index
from sparsekern.kernels.gpu import tables
from sparsekern.kernels.gpu.config import Config, Multiply, Outer, problem
from sparsekern.kernels.gpu.conv2d_lists import lists_kernel
from sparsekern.kernels.gpu.conv2d_multiply import conv2d_multiply_kernel
from sparsekern.kernels.gpu.conv2d_outer import conv2d_outer_kernel
from sparsekern.kernels.gpu.launch import (
    aligned_images,
    alignment,
    arch,
    dot_precision,
    multiprocessors,
    on_device_of,
)
from sparsekern.kernels.gpu.linear import WAVES, tokens_per_split
from sparsekern.kernels.gpu.outer import sum_splits_kernel
from torch import Tensor

Lists = tuple[Tensor, Tensor, Tensor]


def conv2d_fwd(x: Tensor, values: Tensor, bias: Tensor | None, index: Index, shape: ConvShape) -> Tensor:
    """Return ``y (N, Cout, Ho, Wo)``; see :meth:`sparsekern.kernels.contract.Backend.conv2d_fwd`."""
    size_out = shape.output_size(x.shape[2], x.shape[3])
    return _multiply("conv2d_fwd", x, values, bias, (index.row_ptr, index.row_col, index.row_slot), shape, size_out)


def conv2d_dx(dy: Tensor, values: Tensor, index: Index, shape: ConvShape, size: tuple[int, int]) -> Tensor:
    """Return ``dx (N, Cin, H, W)``; see :meth:`sparsekern.kernels.contract.Backend.conv2d_dx`."""
    lists = lists_by_phase(index, shape, (values.shape[1], values.shape[2]))
    return _multiply("conv2d_dx", dy, values, None, lists, shape, size)


def _multiply(
    op: str,
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    lists: Lists,
    shape: ConvShape,
    size_out: tuple[int, int],
) -> Tensor:
    (slots, bo, bi), is_dx = values.shape, op == "conv2d_dx"
    (images, _, height, width), groups, (height_out, width_out) = x.shape, shape.groups, size_out
    top, _, left, _ = shape.padding
    # As conv2d_multiply.py names them. All but the sides is between the source and the result.
    if is_dx:
        side_in, side_out, group_in, group_out = bo, bi, shape.group_out, shape.group_in
        rows, per_tap, mul, div = shape.block_cols(bi), shape.block_rows(bo), (1, 1), shape.stride
        origin, step = (top, left), (-shape.dilation[0], -shape.dilation[1])
    else:
        side_in, side_out, group_in, group_out = bi, bo, shape.group_in, shape.group_out
        rows, per_tap, mul, div = shape.block_rows(bo), shape.block_cols(bi), shape.stride, (1, 1)
        origin, step = (-top, -left), shape.dilation
    y = x.new_empty(images, height_out, width_out, groups * group_out)
    if y.numel() == 0:
        return y.permute(0, 3, 1, 2)

    x = aligned_images(x, groups)
    transposed = is_dx
    stride_k, stride_n = (bi, 1) if transposed else (1, bi)
    values = values.to(x.dtype)
    if transposed and x.dtype == torch.float32:
        values, stride_k, stride_n = values.transpose(1, 2), 1, bo
    values = values.contiguous()
    bias = None if bias is None else bias.contiguous()
    align, precision, phases = alignment(x.dtype), dot_precision(x.dtype), div[0] * div[1]
    pixels = images * -(-height_out // div[0]) * -(-width_out // div[1])  # of the phase with the most

    def launch(config: Config) -> None:
        assert isinstance(config, Multiply)
        conv2d_multiply_kernel[(triton.cdiv(pixels, config.tile_t) * groups * rows, phases)](
            x, values, bias, *lists, y,
            images, height, width, height_out, width_out,
            groups, rows, per_tap, shape.kernel[1], *origin, *step, x.shape[4] // align, group_out,
            ALIGN=align, IN=side_in, OUT=side_out, STRIDE_K=stride_k, STRIDE_N=stride_n,
            MUL_Y=mul[0], MUL_X=mul[1], DIV_Y=div[0], DIV_X=div[1],
            TILE_T=config.tile_t, TILE_K=config.tile_k, GROUP=config.group,
            HAS_BIAS=bias is not None, EDGE_IN=group_in % side_in != 0, EDGE_OUT=group_out % side_out != 0,
            PRECISION=precision, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    which = problem(op, arch(x.device), x.dtype, precision, (bo, bi), pixels, slots, phases * groups * rows)
    with on_device_of(x):
        launch(tables.choose(which, launch))
    return y.permute(0, 3, 1, 2)


def lists_by_phase(index: Index, shape: ConvShape, block: tuple[int, int]) -> Lists:
    """Return the lists of dx: where each begins, and tap with block row, and slot, of each entry."""
    rows, per_tap, (sh, sw) = shape.block_rows(block[0]), shape.block_cols(block[1]), shape.stride
    top, _, left, _ = shape.padding
    count, length = sh * sw * shape.groups * per_tap, index.slots + PADDING
    memory = torch.empty(count + 1 + 2 * length, dtype=torch.int32, device=index.col_ptr.device)
    starts, numbers, slots = memory.split([count + 1, length, length])
    with on_device_of(memory):
        lists_kernel[(count,)](
            index.col_ptr, index.col_row, index.col_slot, starts, numbers, slots,
            shape.taps * per_tap, per_tap, shape.kernel[1], rows, shape.groups, top, left, *shape.dilation,
            (shape.groups * rows).bit_length(),
            STRIDE_Y=sh, STRIDE_X=sw, PADDING=PADDING, COLS=128, RUN=32, num_warps=1,
        )  # fmt: skip
    return starts, numbers, slots


def conv2d_dvalues(
    dy: Tensor, x: Tensor, index: Index, block: tuple[int, int], shape: ConvShape, dtype: torch.dtype
) -> Tensor:
    """Return ``(Z, bo, bi)``; see :meth:`sparsekern.kernels.contract.Backend.conv2d_dvalues`."""
    out = torch.empty(index.slots, *block, dtype=dtype, device=x.device)
    lists = (index.row_ptr, index.row_col, index.row_slot)
    outer_blocks("conv2d_dvalues", dy, x, lists, index.slots, block, shape, out)
    return out


def outer_blocks(
    kernel: str,
    dy: Tensor,
    x: Tensor,
    lists: Lists,
    slots: int,
    block: tuple[int, int],
    shape: ConvShape,
    out: Tensor,
) -> None:
    """Write blocks of the weight's gradient into ``out (Z, bo, bi)``, or their norms into ``out (Z,)``.

    Args:
        kernel: ``conv2d_dvalues`` or ``conv2d_block_norms``.
        dy: ``(N, Cout, Ho, Wo)``, channels last.
        x: ``(N, Cin, H, W)``, likewise.
        lists: ``row_ptr``, ``row_col`` and ``row_slot`` of an index of these blocks.
        slots: Z.
        block: ``(bo, bi)``.
        shape: of the convolution.
        out: contiguous, of any dtype.
    """
    (images, _, height_out, width_out), (bo, bi), groups = dy.shape, block, shape.groups
    tokens, rows, norms = images * height_out * width_out, shape.block_rows(bo), kernel == "conv2d_block_norms"
    if slots == 0:
        return
    if tokens == 0:
        out.zero_()
        return
    (height, width), (top, _, left, _) = x.shape[2:], shape.padding
    x, dy = aligned_images(x, groups), aligned_images(dy, groups)
    align, precision = alignment(x.dtype), dot_precision(x.dtype)

    def launch(config: Config) -> None:
        assert isinstance(config, Outer)
        count = slots // max(1, config.tile_in // bi) + groups * rows + 1
        pieces = max(1, bi // config.tile_in)
        per_split = tokens_per_split(tokens, config.tile_t, count * pieces, WAVES * multiprocessors(x.device))
        splits = triton.cdiv(tokens, per_split)
        parts = out if splits == 1 else torch.empty(splits, slots, bo, bi, dtype=torch.float32, device=x.device)
        conv2d_outer_kernel[(count, splits, pieces)](
            dy, x, *lists, parts,
            tokens, per_split, groups, rows, slots, (groups * rows + 1).bit_length(),
            height, width, height_out, width_out, shape.block_cols(bi), shape.kernel[1], top, left, *shape.dilation,
            shape.group_in, shape.group_out, x.shape[4] // align, dy.shape[4] // align,
            ALIGN=align, BO=bo, BI=bi, TILE_IN=config.tile_in, TILE_T=config.tile_t,
            STRIDE_Y=shape.stride[0], STRIDE_X=shape.stride[1],
            EDGE_T=tokens % config.tile_t != 0, EDGE_IN=shape.group_in % bi != 0, EDGE_OUT=shape.group_out % bo != 0,
            NORMS=norms and splits == 1, PRECISION=precision,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        if splits > 1:
            sum_splits_kernel[(slots,)](
                parts, out, slots, splits, SIZE=bo * bi, NORMS=norms, num_warps=4 if bo * bi < 2**13 else 8
            )

    which = problem(kernel, arch(x.device), x.dtype, precision, block, tokens, slots, groups * rows)
    with on_device_of(x):
        launch(tables.choose(which, launch))
