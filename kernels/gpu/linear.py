"""The block-sparse linear layer on Triton. Axes and edge cases: :mod:`sparsekern.kernels.contract`.

These functions choose a configuration and launch; they check nothing. What they hold beside inputs and outputs:

    x, dy     a copy, if a row is not contiguous and 16-byte aligned
    values    a copy in the compute dtype, if that is another one; for dx in float32 a transposed copy, because
              Hopper's tf32 reads its operands along K only
    dvalues   a float32 workspace of all blocks for each split of the tokens, if blocks are too few for the device
"""

from __future__ import annotations

import torch
import triton
from sparsekern.kernels.contract import Index
from sparsekern.kernels.gpu import tables
from sparsekern.kernels.gpu.config import Config, FewTokens, Multiply, Outer, problem
from sparsekern.kernels.gpu.few_tokens import few_tokens_kernel
from sparsekern.kernels.gpu.launch import aligned_rows, alignment, arch, dot_precision, multiprocessors, on_device_of
from sparsekern.kernels.gpu.multiply import multiply_kernel
from sparsekern.kernels.gpu.multiply_tma import can_describe, descriptor, multiply_tma_kernel
from sparsekern.kernels.gpu.outer import outer_kernel, sum_splits_kernel
from torch import Tensor

FEW_TOKENS = 32
"""Up to so many tokens the weight goes on M."""

WAVES = 2
"""Tokens are split until there are so many programs for each multiprocessor."""


def fwd(x: Tensor, values: Tensor, bias: Tensor | None, index: Index, out_features: int) -> Tensor:
    """Return ``y (T, O)``; see :meth:`sparsekern.kernels.contract.Backend.fwd`."""
    lists = (index.row_ptr, index.row_col, index.row_slot)
    return _multiply("fwd", x, values, bias, lists, out_features)


def dx(dy: Tensor, values: Tensor, index: Index, in_features: int) -> Tensor:
    """Return ``dx (T, I)``; see :meth:`sparsekern.kernels.contract.Backend.dx`."""
    lists = (index.col_ptr, index.col_row, index.col_slot)
    return _multiply("dx", dy, values, None, lists, in_features)


def _multiply(
    op: str, x: Tensor, values: Tensor, bias: Tensor | None, lists: tuple[Tensor, Tensor, Tensor], features: int
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
    values = values.contiguous()
    bias = None if bias is None else bias.contiguous()
    align, precision = alignment(x.dtype), dot_precision(x.dtype)
    edge_in, edge_out = in_features % side_in != 0, features % side_out != 0

    def launch(config: Config) -> None:
        if isinstance(config, FewTokens):
            few_tokens_kernel[(rows * (side_out // config.tile_n),)](
                x, values, bias, *lists, y,
                tokens, x.shape[1] // align, features, x.stride(0) // align,
                ALIGN=align, IN=side_in, OUT=side_out, STRIDE_K=stride_k, STRIDE_N=stride_n,
                TOKENS=max(16, triton.next_power_of_2(tokens)), TILE_K=config.tile_k, TILE_N=config.tile_n,
                HAS_BIAS=bias is not None, EDGE_IN=edge_in, PRECISION=precision,
                num_warps=config.warps, num_stages=config.stages,
            )  # fmt: skip
            return
        assert isinstance(config, Multiply)
        grid = (triton.cdiv(tokens, config.tile_t) * rows,)
        if config.tma and can_describe(x, values, (config.tile_t, config.tile_k)):
            multiply_tma_kernel[grid](
                descriptor(x, (config.tile_t, config.tile_k)),
                descriptor(values.flatten(0, 1), (config.tile_k, bi) if transposed else (side_out, config.tile_k)),
                bias, *lists, y,
                tokens, rows, features,
                IN=side_in, OUT=side_out, TRANSPOSED=transposed,
                TILE_T=config.tile_t, TILE_K=config.tile_k, GROUP=config.group,
                HAS_BIAS=bias is not None, EDGE_OUT=edge_out, PRECISION=precision,
                num_warps=config.warps, num_stages=config.stages,
            )  # fmt: skip
            return
        multiply_kernel[grid](
            x, values, bias, *lists, y,
            tokens, rows, x.shape[1] // align, features, x.stride(0) // align,
            ALIGN=align, IN=side_in, OUT=side_out, STRIDE_K=stride_k, STRIDE_N=stride_n,
            TILE_T=config.tile_t, TILE_K=config.tile_k, GROUP=config.group,
            HAS_BIAS=bias is not None, EDGE_IN=edge_in, EDGE_OUT=edge_out, PRECISION=precision,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    kernel = f"few_{op}" if few else op
    which = problem(kernel, arch(x.device), x.dtype, precision, (bo, bi), tokens, slots, rows)
    with on_device_of(x):
        launch(tables.choose(which, launch))
    return y


def dvalues(dy: Tensor, x: Tensor, index: Index, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return ``(Z, bo, bi)``; see :meth:`sparsekern.kernels.contract.Backend.dvalues`."""
    out = torch.empty(index.slots, *block, dtype=dtype, device=x.device)
    outer_blocks("dvalues", dy, x, (index.row_ptr, index.row_col, index.row_slot), index.slots, block, out)
    return out


def outer_blocks(
    kernel: str,
    dy: Tensor,
    x: Tensor,
    lists: tuple[Tensor, Tensor, Tensor],
    slots: int,
    block: tuple[int, int],
    out: Tensor,
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

    def launch(config: Config) -> None:
        assert isinstance(config, Outer)
        groups = slots // max(1, config.tile_in // bi) + rows + 1
        pieces = max(1, bi // config.tile_in)
        per_split = tokens_per_split(tokens, config.tile_t, groups * pieces, WAVES * multiprocessors(x.device))
        splits = triton.cdiv(tokens, per_split)
        parts = out if splits == 1 else torch.empty(splits, slots, bo, bi, dtype=torch.float32, device=x.device)
        outer_kernel[(groups, splits, pieces)](
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

    with on_device_of(x):
        launch(tables.choose(problem(kernel, arch(x.device), x.dtype, precision, block, tokens, slots, rows), launch))


def tokens_per_split(tokens: int, tile_t: int, programs: int, wanted: int) -> int:
    """Return how many tokens a program takes: a multiple of the tile, all of them if there are programs enough.

    At least eight tiles, so that the pipeline is worth filling.
    """
    splits = min(-(-wanted // programs), max(1, tokens // (8 * tile_t)))
    per_split: int = triton.cdiv(triton.cdiv(tokens, splits), tile_t) * tile_t
    return per_split
