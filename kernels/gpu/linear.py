"""The block-sparse linear layer on Triton. Axes and edge cases: :mod:`sparsekern.kernels.contract`.

These functions choose a configuration and launch; they check nothing. What they hold beside inputs and outputs:

    x, dy     a copy, if a row is not contiguous and 16-byte aligned
    values    a copy in the compute dtype, if that is another one; for dx in float32 a transposed copy, because
              Hopper's tf32 reads its operands along K only
    dvalues   a float32 workspace of all blocks for each split of the tokens, if blocks are too few for the device
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from sparsekern.kernels.contract import Index, LinearShape, Lists
from sparsekern.kernels.eager import linear as eager
from sparsekern.kernels.gpu import tables
from sparsekern.kernels.gpu.config import (
    Config,
    FewTokens,
    Multiply,
    Outer,
    Supertile,
    ceil_div,
    log2_ceil,
    problem,
)
from sparsekern.kernels.gpu.launch import (
    aligned,
    aligned_rows,
    alignment,
    arch,
    dot_precision,
    multiprocessors,
    on_device_of,
)
from sparsekern.kernels.gpu.multiply import (
    can_describe,
    descriptor,
    few_tokens_kernel,
    multiply_kernel,
    multiply_tma_kernel,
)
from sparsekern.kernels.gpu.outer import outer_kernel, projection_kernel, sum_splits_kernel, supertile_kernel
from torch import Tensor

FEW_TOKENS = 32
"""Up to this many tokens the weight goes on M."""

SKETCH_BYTES = 64 * 2**20
"""Bytes of projected tokens that :func:`sketch` may hold at a time."""

PROJECTED = 64
"""Tokens of a program that projects them."""


def fwd(x: Tensor, values: Tensor, bias: Tensor | None, index: Index, geometry: LinearShape) -> Tensor:
    """Return ``y (T, O)``; see :meth:`sparsekern.kernels.contract.Kernels.fwd`."""
    exact = partial(eager.fwd, x, values, bias, index, geometry)
    return _multiply("fwd", x, values, bias, index.by_row, geometry.out_features, exact)


def dx(dy: Tensor, values: Tensor, index: Index, geometry: LinearShape, size: tuple[int, ...] = ()) -> Tensor:
    """Return ``dx (T, I)``; see :meth:`sparsekern.kernels.contract.Kernels.dx`."""
    exact = partial(eager.dx, dy, values, index, geometry)
    return _multiply("dx", dy, values, None, index.by_col, geometry.in_features, exact)


def _multiply(
    op: str,
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    lists: Lists,
    features: int,
    exact: Callable[[], Tensor],
) -> Tensor:
    (tokens, in_features), (slots, bo, bi) = x.shape, values.shape
    transposed = op == "dx"
    side_in, side_out = (bo, bi) if transposed else (bi, bo)
    rows = lists[0].shape[0] - 1
    y = x.new_empty(tokens, features)
    if tokens == 0:
        return y

    x = aligned_rows(x)
    few = tokens <= FEW_TOKENS
    stride_k, stride_n = (bi, 1) if transposed else (1, bi)
    if not few:
        values = values.to(x.dtype)
        if transposed and x.dtype == torch.float32:
            values, transposed = values.transpose(1, 2), False
            stride_k, stride_n = 1, bo
    values = aligned(values)
    bias = None if bias is None else bias.contiguous()
    align, precision = alignment(x.dtype), dot_precision(x.dtype)
    edge_in, edge_out = in_features % side_in != 0, features % side_out != 0

    def launch(config: Config) -> Tensor:
        if isinstance(config, FewTokens):
            few_tokens_kernel[(rows * (side_out // config.tile_n),)](
                x, values, bias, *lists, y,
                tokens, x.shape[1] // align, features, x.stride(0) // align,
                ALIGN=align, IN=side_in, OUT=side_out, STRIDE_K=stride_k, STRIDE_N=stride_n,
                TOKENS=max(16, 2 ** log2_ceil(tokens)), TILE_K=config.tile_k, TILE_N=config.tile_n,
                HAS_BIAS=bias is not None, EDGE_IN=edge_in, PRECISION=precision,
                num_warps=config.warps, num_stages=config.stages,
            )  # fmt: skip
            return y
        assert isinstance(config, Multiply)
        grid = (ceil_div(tokens, config.tile_t) * rows * config.cut,)
        tile_n = side_out // config.cut
        if config.tma and can_describe(x, values, (config.tile_t, config.tile_k)):
            multiply_tma_kernel[grid](
                descriptor(x, (config.tile_t, config.tile_k)),
                descriptor(values.flatten(0, 1), (config.tile_k, tile_n) if transposed else (tile_n, config.tile_k)),
                bias, *lists, y,
                tokens, rows, features,
                IN=side_in, OUT=side_out, TRANSPOSED=transposed,
                TILE_T=config.tile_t, TILE_K=config.tile_k, GROUP=config.group, CUT=config.cut,
                HAS_BIAS=bias is not None, EDGE_OUT=edge_out, PRECISION=precision,
                num_warps=config.warps, num_stages=config.stages,
            )  # fmt: skip
            return y
        multiply_kernel[grid](
            x, values, bias, *lists, y,
            tokens, rows, x.shape[1] // align, features, x.stride(0) // align,
            ALIGN=align, IN=side_in, OUT=side_out, STRIDE_K=stride_k, STRIDE_N=stride_n,
            TILE_T=config.tile_t, TILE_K=config.tile_k, GROUP=config.group, CUT=config.cut,
            HAS_BIAS=bias is not None, EDGE_IN=edge_in, EDGE_OUT=edge_out, PRECISION=precision,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        return y

    kernel = f"few_{op}" if few else op
    which = problem(kernel, arch(x.device), x.dtype, precision, (bo, bi), tokens, slots, rows)
    with on_device_of(x):
        tables.run(which, launch, exact)
    return y


def dvalues(
    dy: Tensor, x: Tensor, index: Index, block: tuple[int, int], geometry: LinearShape, dtype: torch.dtype
) -> Tensor:
    """Return ``(Z, bo, bi)``; see :meth:`sparsekern.kernels.contract.Kernels.dvalues`."""
    out = torch.empty(index.slots, *block, dtype=dtype, device=x.device)
    exact = partial(eager.dvalues, dy, x, index, block, geometry, dtype)
    outer_blocks("dvalues", dy, x, index.by_row, index.slots, block, out, exact)
    return out


def backward(dy: Tensor, x: Tensor, values: Tensor, index: Index, geometry: LinearShape) -> tuple[Tensor, Tensor]:
    """Return ``dx, dvalues``; see :meth:`sparsekern.kernels.contract.Kernels.backward`."""
    block = (values.shape[1], values.shape[2])
    return dx(dy, values, index, geometry), dvalues(dy, x, index, block, geometry, values.dtype)


def outer_blocks(
    kernel: str,
    dy: Tensor,
    x: Tensor,
    lists: Lists,
    slots: int,
    block: tuple[int, int],
    out: Tensor,
    exact: Callable[[], Tensor],
) -> None:
    """Write blocks of ``dy' x`` into ``out (Z, bo, bi)``, or their norms into ``out (Z,)``.

    Args:
        kernel: ``dvalues`` or ``block_norms``.
        dy: ``(T, O)``.
        x: ``(T, I)``.
        lists: ``row_ptr``, ``row_col`` and ``row_slot`` of an index of these blocks.
        slots: Z.
        block: ``(bo, bi)``.
        out: contiguous, of any dtype.
        exact: computes the same another way; see :func:`sparsekern.kernels.gpu.tables.run`.
    """
    (tokens, in_features), out_features = x.shape, dy.shape[1]
    (bo, bi), rows, norms = block, lists[0].shape[0] - 1, kernel == "block_norms"
    if slots == 0:
        return
    if tokens == 0:
        out.zero_()
        return
    x, dy = aligned_rows(x), aligned_rows(dy)
    align, precision = alignment(x.dtype), dot_precision(x.dtype)

    def launch(config: Config) -> Tensor:
        assert isinstance(config, Outer)
        programs, working = groups_of(slots, rows, max(1, config.tile_in // bi))
        pieces = max(1, bi // config.tile_in)
        wanted = config.waves * multiprocessors(x.device)
        per_split = tokens_per_split(tokens, config.tile_t, working * pieces, wanted)
        splits = ceil_div(tokens, per_split)
        parts = out if splits == 1 else torch.empty(splits, slots, bo, bi, dtype=torch.float32, device=x.device)
        outer_kernel[(programs, splits, pieces)](
            dy, x, *lists, parts,
            tokens, per_split, rows, slots, (rows + 1).bit_length(), in_features, out_features,
            x.shape[1] // align, dy.shape[1] // align, x.stride(0) // align, dy.stride(0) // align,
            ALIGN=align, BO=bo, BI=bi, TILE_IN=config.tile_in, TILE_T=config.tile_t,
            EDGE_T=tokens % config.tile_t != 0, EDGE_IN=in_features % bi != 0, EDGE_OUT=out_features % bo != 0,
            NORMS=norms and splits == 1, PRECISION=precision,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        if splits > 1:
            sum_splits_kernel[(slots,)](
                parts, out, slots, splits, SIZE=bo * bi, NORMS=norms, num_warps=4 if bo * bi < 2**13 else 8
            )
        return out

    which = problem(kernel, arch(x.device), x.dtype, precision, block, tokens, slots, rows)
    with on_device_of(x):
        tables.run(which, launch, exact)


def groups_of(slots: int, rows: int, blocks: int) -> tuple[int, int]:
    """Return how many programs find their groups of ``blocks`` blocks, and how many of them have one, in the mean."""
    return slots // blocks + rows + 1, max(1, slots // blocks + rows * (blocks - 1) // (2 * blocks))


def tokens_per_split(tokens: int, tile_t: int, programs: int, wanted: int) -> int:
    """Return how many tokens a program takes: a multiple of the tile, all of them if there are programs enough.

    At least eight tiles, so that the pipeline is worth filling.
    """
    splits = min(ceil_div(wanted, programs), max(1, tokens // (8 * tile_t)))
    return ceil_div(ceil_div(tokens, splits), tile_t) * tile_t


def block_norms(
    dy: Tensor, x: Tensor, row: Tensor, col: Tensor, block: tuple[int, int], geometry: LinearShape
) -> Tensor:
    """Return the norms ``(K,)`` of chosen blocks; see :meth:`sparsekern.kernels.contract.Kernels.block_norms`."""
    norms = torch.empty(row.shape[0], dtype=torch.float32, device=x.device)
    lists = lists_of(row, col, geometry.cells(block)[0])
    exact = partial(eager.block_norms, dy, x, row, col, block, geometry)
    outer_blocks("block_norms", dy, x, lists, row.shape[0], block, norms, exact)
    return norms


def lists_of(row: Tensor, col: Tensor, rows: int) -> Lists:
    """Return the lists of chosen blocks: where each block row begins, and the column and number of each block.

    In the order of block rows, blocks side by side share the tiles of dy.
    """
    sorted_row, order = row.sort(stable=True)
    starts = torch.arange(rows + 1, dtype=row.dtype, device=row.device)
    row_ptr = torch.searchsorted(sorted_row, starts, out_int32=True)
    return row_ptr, col[order], order.int()


def all_block_norms(dy: Tensor, x: Tensor, block: tuple[int, int], geometry: LinearShape) -> Tensor:
    """Return the norms ``(R, C)`` of all blocks; see :meth:`sparsekern.kernels.contract.Kernels.all_block_norms`."""
    (bo, bi), tokens = block, x.shape[0]
    (in_features, out_features), (rows, cols) = geometry, geometry.cells(block)
    norms = torch.empty(rows, cols, dtype=torch.float32, device=x.device)
    if tokens == 0:
        return norms.zero_()
    exact = partial(eager.all_block_norms, dy, x, block, geometry)
    x, dy = aligned_rows(x), aligned_rows(dy)
    align, precision = alignment(x.dtype), dot_precision(x.dtype)

    def launch(config: Config) -> Tensor:
        assert isinstance(config, Supertile)
        grid = (ceil_div(rows * bo, config.tile_out) * ceil_div(cols * bi, config.tile_in),)
        supertile_kernel[grid](
            dy, x, norms,
            tokens, in_features, out_features,
            x.shape[1] // align, dy.shape[1] // align, x.stride(0) // align, dy.stride(0) // align, rows, cols,
            ALIGN=align, BO=bo, BI=bi,
            TILE_OUT=config.tile_out, TILE_IN=config.tile_in, TILE_T=config.tile_t, PRECISION=precision,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        return norms

    with on_device_of(x):
        which = problem("all_block_norms", arch(x.device), x.dtype, precision, block, tokens, rows * cols, rows)
        tables.run(which, launch, exact)
    return norms


def sketch(dy: Tensor, x: Tensor, u: Tensor, v: Tensor, block: tuple[int, int], geometry: LinearShape) -> Tensor:
    """Return ``(r, R, C)``; see :meth:`sparsekern.kernels.contract.Kernels.sketch`.

    ``u' G v`` of a block is a sum over tokens of ``(dy . u) (x . v)``: both are projected first, which is one pass over
    each, and multiplied then. That is ``bo * bi / r`` times less work than forming G in an accumulator.
    """
    (bo, bi), pairs, tokens = block, u.shape[0], x.shape[0]
    rows, cols = geometry.cells(block)
    total = torch.zeros(pairs, rows, cols, dtype=torch.float32, device=x.device)
    if pairs == 0:
        return total
    panel = max(PROJECTED, SKETCH_BYTES // (4 * pairs * (rows + cols)) // PROJECTED * PROJECTED)
    for start in range(0, tokens, panel):
        left = project(dy[start : start + panel], u, bo)
        right = project(x[start : start + panel], v, bi)
        total.baddbmm_(left, right.transpose(1, 2))
    return total


def project(x: Tensor, directions: Tensor, side: int) -> Tensor:
    """Return ``(r, blocks, T)``: each block of columns of ``x (T, F)`` times that part of each direction ``(r, F)``."""
    (tokens, features), pairs = x.shape, directions.shape[0]
    blocks = -(-features // side)
    out = torch.empty(pairs, blocks, tokens, dtype=torch.float32, device=x.device)
    directions = directions.float().contiguous()
    with on_device_of(x):
        projection_kernel[(ceil_div(tokens, PROJECTED) * blocks,)](
            x, directions, out,
            tokens, features, blocks, pairs, x.stride(0), x.stride(1),
            SIDE=side, TILE_T=PROJECTED, num_warps=4,
        )  # fmt: skip
    return out
