"""The block-sparse convolution on Triton. Axes and edge cases: :mod:`sparsekern.kernels.contract`.

These functions choose a configuration and launch; they check nothing. What they hold beside inputs and outputs:

    x, dy     a copy, if the channels of a group are no multiple of 16 bytes
    values    as in :mod:`sparsekern.kernels.gpu.linear`
    dx        the lists of blocks by phase, 8 bytes a block, kept with the index until it is written to
    dvalues   a float32 workspace of all blocks for each split of the pixels, if blocks are too few for the device
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from sparsekern.kernels.contract import PADDING, ConvShape, Index, Lists
from sparsekern.kernels.eager import conv2d as eager
from sparsekern.kernels.gpu import tables
from sparsekern.kernels.gpu.config import Config, Multiply, Outer, Supertile, ceil_div, problem
from sparsekern.kernels.gpu.conv2d_multiply import conv2d_multiply_kernel, lists_kernel
from sparsekern.kernels.gpu.conv2d_outer import (
    conv2d_outer_kernel,
    conv2d_projection_kernel,
    conv2d_supertile_kernel,
)
from sparsekern.kernels.gpu.launch import (
    aligned,
    aligned_images,
    alignment,
    arch,
    dot_precision,
    multiprocessors,
    on_default_stream,
    on_device_of,
)
from sparsekern.kernels.gpu.linear import PROJECTED, SKETCH_BYTES, groups_of, lists_of, project, tokens_per_split
from sparsekern.kernels.gpu.outer import sum_splits_kernel
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_kept: Any = WeakIdKeyDictionary()
"""By ``col_slot`` of an index: what its lists for dx were made of, and the lists."""


def fwd(x: Tensor, values: Tensor, bias: Tensor | None, index: Index, geometry: ConvShape) -> Tensor:
    """Return ``y (N, Cout, Ho, Wo)``; see :meth:`sparsekern.kernels.contract.Kernels.fwd`."""
    size_out = geometry.output_size(x.shape[2], x.shape[3])
    exact = partial(eager.fwd, x, values, bias, index, geometry)
    return _multiply("conv2d_fwd", x, values, bias, index.by_row, geometry, size_out, exact)


def dx(dy: Tensor, values: Tensor, index: Index, geometry: ConvShape, size: tuple[int, ...]) -> Tensor:
    """Return ``dx (N, Cin, H, W)``; see :meth:`sparsekern.kernels.contract.Kernels.dx`."""
    lists = kept_lists(index, geometry, (values.shape[1], values.shape[2]))
    exact = partial(eager.dx, dy, values, index, geometry, size)
    return _multiply("conv2d_dx", dy, values, None, lists, geometry, size, exact)


def _multiply(
    op: str,
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    lists: Lists,
    geometry: ConvShape,
    size_out: tuple[int, ...],
    exact: Callable[[], Tensor],
) -> Tensor:
    (slots, bo, bi), is_dx = values.shape, op == "conv2d_dx"
    (images, _, height, width), groups, (height_out, width_out) = x.shape, geometry.groups, size_out
    top, _, left, _ = geometry.padding
    # As conv2d_multiply.py names them. All but the sides is between the source and the result.
    if is_dx:
        side_in, side_out, group_in, group_out = bo, bi, geometry.group_out, geometry.group_in
        rows, per_tap, mul, div = geometry.block_cols(bi), geometry.block_rows(bo), (1, 1), geometry.stride
        origin, step = (top, left), (-geometry.dilation[0], -geometry.dilation[1])
    else:
        side_in, side_out, group_in, group_out = bi, bo, geometry.group_in, geometry.group_out
        rows, per_tap, mul, div = geometry.block_rows(bo), geometry.block_cols(bi), geometry.stride, (1, 1)
        origin, step = (-top, -left), geometry.dilation
    y = x.new_empty(images, height_out, width_out, groups * group_out).permute(0, 3, 1, 2)
    if y.numel() == 0:
        return y

    x = aligned_images(x, groups)
    transposed = is_dx
    stride_k, stride_n = (bi, 1) if transposed else (1, bi)
    values = values.to(x.dtype)
    if transposed and x.dtype == torch.float32:
        values, stride_k, stride_n = values.transpose(1, 2), 1, bo
    values = aligned(values)
    bias = None if bias is None else bias.contiguous()
    align, precision, phases = alignment(x.dtype), dot_precision(x.dtype), div[0] * div[1]
    pixels = images * ceil_div(height_out, div[0]) * ceil_div(width_out, div[1])  # of the phase with the most

    def launch(config: Config) -> Tensor:
        assert isinstance(config, Multiply)
        conv2d_multiply_kernel[(ceil_div(pixels, config.tile_t) * groups * rows, phases)](
            x, values, bias, *lists, y,
            images, height, width, height_out, width_out,
            groups, rows, per_tap, geometry.kernel[1], *origin, *step, x.shape[4] // align, group_out,
            ALIGN=align, IN=side_in, OUT=side_out, STRIDE_K=stride_k, STRIDE_N=stride_n,
            MUL_Y=mul[0], MUL_X=mul[1], DIV_Y=div[0], DIV_X=div[1],
            TILE_T=config.tile_t, TILE_K=config.tile_k, GROUP=config.group,
            HAS_BIAS=bias is not None, EDGE_IN=group_in % side_in != 0, EDGE_OUT=group_out % side_out != 0,
            PRECISION=precision, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        return y

    which = problem(op, arch(x.device), x.dtype, precision, (bo, bi), pixels, slots, phases * groups * rows)
    with on_device_of(x):
        tables.run(which, launch, exact)
    return y


def kept_lists(index: Index, geometry: ConvShape, block: tuple[int, int]) -> Lists:
    """Return the lists of dx, made by :func:`lists_by_phase` if there are none of the index as it is now."""
    if any(part.is_inference() for part in index.by_col):  # nobody counts the writes into them
        return lists_by_phase(index, geometry, block)
    if not on_default_stream(index.col_slot.device):
        # Graphs are warmed up and captured there, in memory of their own, and blocks may move between replays. And
        # nobody waits for what another stream has made without being seen.
        return lists_by_phase(index, geometry, block)
    made_of = (*(part._version for part in index.by_col), geometry, block)
    kept: tuple[Any, Lists] | None = _kept.get(index.col_slot)
    if kept is None or kept[0] != made_of:
        kept = _kept[index.col_slot] = (made_of, lists_by_phase(index, geometry, block))
    return kept[1]


def lists_by_phase(index: Index, geometry: ConvShape, block: tuple[int, int]) -> Lists:
    """Return the lists of dx: where each begins, and tap with block row, and slot, of each entry."""
    rows, per_tap, (sh, sw) = geometry.block_rows(block[0]), geometry.block_cols(block[1]), geometry.stride
    top, _, left, _ = geometry.padding
    count, length = sh * sw * geometry.groups * per_tap, index.slots + PADDING
    memory = torch.empty(count + 1 + 2 * length, dtype=torch.int32, device=index.col_ptr.device)
    starts, numbers, slots = memory.split([count + 1, length, length])
    with on_device_of(memory):
        lists_kernel[(count,)](
            index.col_ptr, index.col_row, index.col_slot, starts, numbers, slots,
            geometry.taps * per_tap, per_tap, geometry.kernel[1], rows, geometry.groups, top, left, *geometry.dilation,
            (geometry.groups * rows).bit_length(),
            STRIDE_Y=sh, STRIDE_X=sw, GROUPED=geometry.groups > 1, PADDING=PADDING, COLS=128, RUN=32, num_warps=1,
        )  # fmt: skip
    return starts, numbers, slots


def dvalues(
    dy: Tensor, x: Tensor, index: Index, block: tuple[int, int], geometry: ConvShape, dtype: torch.dtype
) -> Tensor:
    """Return ``(Z, bo, bi)``; see :meth:`sparsekern.kernels.contract.Kernels.dvalues`."""
    out = torch.empty(index.slots, *block, dtype=dtype, device=x.device)
    exact = partial(eager.dvalues, dy, x, index, block, geometry, dtype)
    outer_blocks("conv2d_dvalues", dy, x, index.by_row, index.slots, block, geometry, out, exact)
    return out


def backward(dy: Tensor, x: Tensor, values: Tensor, index: Index, geometry: ConvShape) -> tuple[Tensor, Tensor]:
    """Return ``dx, dvalues``; see :meth:`sparsekern.kernels.contract.Kernels.backward`."""
    block, size = (values.shape[1], values.shape[2]), (x.shape[2], x.shape[3])
    return dx(dy, values, index, geometry, size), dvalues(dy, x, index, block, geometry, values.dtype)


def outer_blocks(
    kernel: str,
    dy: Tensor,
    x: Tensor,
    lists: Lists,
    slots: int,
    block: tuple[int, int],
    geometry: ConvShape,
    out: Tensor,
    exact: Callable[[], Tensor],
) -> None:
    """Write blocks of the weight's gradient into ``out (Z, bo, bi)``, or their norms into ``out (Z,)``.

    Args:
        kernel: ``conv2d_dvalues`` or ``conv2d_block_norms``.
        dy: ``(N, Cout, Ho, Wo)``, channels last.
        x: ``(N, Cin, H, W)``, likewise.
        lists: ``row_ptr``, ``row_col`` and ``row_slot`` of an index of these blocks.
        slots: Z.
        block: ``(bo, bi)``.
        geometry: of the convolution.
        out: contiguous, of any dtype.
        exact: computes the same another way; see :func:`sparsekern.kernels.gpu.tables.run`.
    """
    (images, _, height_out, width_out), (bo, bi), groups = dy.shape, block, geometry.groups
    tokens, rows, norms = images * height_out * width_out, geometry.block_rows(bo), kernel == "conv2d_block_norms"
    if slots == 0:
        return
    if tokens == 0:
        out.zero_()
        return
    (height, width), (top, _, left, _) = x.shape[2:], geometry.padding
    x, dy = aligned_images(x, groups), aligned_images(dy, groups)
    align, precision = alignment(x.dtype), dot_precision(x.dtype)

    def launch(config: Config) -> Tensor:
        assert isinstance(config, Outer)
        programs, working = groups_of(slots, groups * rows, max(1, config.tile_in // bi))
        pieces = max(1, bi // config.tile_in)
        wanted = config.waves * multiprocessors(x.device)
        per_split = tokens_per_split(tokens, config.tile_t, working * pieces, wanted)
        splits = ceil_div(tokens, per_split)
        parts = out if splits == 1 else torch.empty(splits, slots, bo, bi, dtype=torch.float32, device=x.device)
        conv2d_outer_kernel[(programs, splits, pieces)](
            dy, x, *lists, parts,
            tokens, per_split, groups, rows, slots, (groups * rows + 1).bit_length(),
            height, width, height_out, width_out,
            geometry.block_cols(bi), geometry.kernel[1], top, left, *geometry.dilation,
            geometry.group_in, geometry.group_out, x.shape[4] // align, dy.shape[4] // align,
            ALIGN=align, BO=bo, BI=bi, TILE_IN=config.tile_in, TILE_T=config.tile_t,
            STRIDE_Y=geometry.stride[0], STRIDE_X=geometry.stride[1],
            EDGE_T=tokens % config.tile_t != 0,
            EDGE_IN=geometry.group_in % bi != 0, EDGE_OUT=geometry.group_out % bo != 0,
            NORMS=norms and splits == 1, PRECISION=precision,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        if splits > 1:
            sum_splits_kernel[(slots,)](
                parts, out, slots, splits, SIZE=bo * bi, NORMS=norms, num_warps=4 if bo * bi < 2**13 else 8
            )
        return out

    which = problem(kernel, arch(x.device), x.dtype, precision, block, tokens, slots, groups * rows)
    with on_device_of(x):
        tables.run(which, launch, exact)


def block_norms(dy: Tensor, x: Tensor, row: Tensor, col: Tensor, block: tuple[int, int], geometry: ConvShape) -> Tensor:
    """Return the norms ``(K,)``; see :meth:`sparsekern.kernels.contract.Kernels.block_norms`."""
    norms = torch.empty(row.shape[0], dtype=torch.float32, device=x.device)
    lists = lists_of(row, col, geometry.groups * geometry.block_rows(block[0]))
    exact = partial(eager.block_norms, dy, x, row, col, block, geometry)
    outer_blocks("conv2d_block_norms", dy, x, lists, row.shape[0], block, geometry, norms, exact)
    return norms


def all_block_norms(dy: Tensor, x: Tensor, block: tuple[int, int], geometry: ConvShape) -> Tensor:
    """Return the norms ``(R, C)``; see :meth:`sparsekern.kernels.contract.Kernels.all_block_norms`."""
    (bo, bi), (images, _, height_out, width_out), groups = block, dy.shape, geometry.groups
    rows, per_tap, tokens = geometry.block_rows(bo), geometry.block_cols(bi), images * height_out * width_out
    norms = torch.empty(groups * rows, geometry.taps * per_tap, dtype=torch.float32, device=x.device)
    if tokens == 0:
        return norms.zero_()
    (height, width), (top, _, left, _) = x.shape[2:], geometry.padding
    exact = partial(eager.all_block_norms, dy, x, block, geometry)
    x, dy = aligned_images(x, groups), aligned_images(dy, groups)
    align, precision = alignment(x.dtype), dot_precision(x.dtype)

    def launch(config: Config) -> Tensor:
        assert isinstance(config, Supertile)
        tiles = ceil_div(rows * bo, config.tile_out) * ceil_div(per_tap * bi, config.tile_in)
        conv2d_supertile_kernel[(tiles * groups * geometry.taps,)](
            dy, x, norms,
            tokens, groups, rows, height, width, height_out, width_out,
            geometry.taps, per_tap, geometry.kernel[1], top, left, *geometry.dilation,
            geometry.group_in, geometry.group_out, x.shape[4] // align, dy.shape[4] // align,
            ALIGN=align, BO=bo, BI=bi, STRIDE_Y=geometry.stride[0], STRIDE_X=geometry.stride[1],
            TILE_OUT=config.tile_out, TILE_IN=config.tile_in, TILE_T=config.tile_t, PRECISION=precision,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        return norms

    name = "conv2d_all_block_norms"
    which = problem(name, arch(x.device), x.dtype, precision, block, tokens, norms.numel(), groups * rows)
    with on_device_of(x):
        tables.run(which, launch, exact)
    return norms


def sketch(dy: Tensor, x: Tensor, u: Tensor, v: Tensor, block: tuple[int, int], geometry: ConvShape) -> Tensor:
    """Return ``(r, R, C)``; see :meth:`sparsekern.kernels.contract.Kernels.sketch`.

    As :func:`sparsekern.kernels.gpu.linear.sketch`: pixels of dy, and of x as each tap sees them, are projected first.
    """
    (bo, bi), pairs, groups = block, u.shape[0], geometry.groups
    rows, cols = geometry.block_rows(bo), geometry.taps * geometry.block_cols(bi)
    total = torch.zeros(pairs, groups, rows, cols, dtype=torch.float32, device=x.device)
    tokens = dy.permute(0, 2, 3, 1).reshape(-1, geometry.out_channels)
    panel = max(PROJECTED, SKETCH_BYTES // max(1, 4 * pairs * groups * (rows + cols)) // PROJECTED * PROJECTED)
    for start in range(0, tokens.shape[0] if pairs else 0, panel):
        part = tokens[start : start + panel]
        right = _project(x, v, (start, part.shape[0]), (dy.shape[2], dy.shape[3]), bi, geometry)
        for group, (of_group, directions) in enumerate(zip(part.chunk(groups, 1), u.chunk(groups, 1), strict=True)):
            total[:, group] += project(of_group, directions, bo) @ right[:, group].transpose(1, 2)
    return total.flatten(1, 2)


def _project(
    x: Tensor, directions: Tensor, pixels: tuple[int, int], size_out: tuple[int, int], side: int, geometry: ConvShape
) -> Tensor:
    """Return ``(r, groups, C, T)`` for ``pixels``: the first one of y and how many, T."""
    (first, tokens), pairs, per_tap = pixels, directions.shape[0], geometry.block_cols(side)
    (height, width), (top, _, left, _) = x.shape[2:], geometry.padding
    out = torch.empty(pairs, geometry.groups, geometry.taps * per_tap, tokens, dtype=torch.float32, device=x.device)
    with on_device_of(x):
        conv2d_projection_kernel[(ceil_div(tokens, PROJECTED) * geometry.groups * geometry.taps * per_tap,)](
            x, directions.float().contiguous(), out,
            first, tokens, geometry.groups, geometry.group_in, height, width, *size_out,
            geometry.taps, per_tap, geometry.kernel[1], top, left, *geometry.dilation, pairs,
            SIDE=side, TILE_T=PROJECTED, STRIDE_Y=geometry.stride[0], STRIDE_X=geometry.stride[1],
            num_warps=8 if side == 128 else 4,
        )  # fmt: skip
    return out
