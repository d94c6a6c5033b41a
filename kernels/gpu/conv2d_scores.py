"""What a training method wants to know of the gradient of a convolution's whole weight, reduced as it is formed."""

from __future__ import annotations

import torch
import triton
from sparsekern.kernels.contract import ConvShape
from sparsekern.kernels.gpu import tables
from sparsekern.kernels.gpu.config import Config, Supertile, problem
from sparsekern.kernels.gpu.conv2d import outer_blocks
from sparsekern.kernels.gpu.conv2d_projection import conv2d_projection_kernel
from sparsekern.kernels.gpu.conv2d_supertiles import conv2d_supertile_kernel
from sparsekern.kernels.gpu.launch import aligned_images, alignment, arch, dot_precision, on_device_of
from sparsekern.kernels.gpu.projection import TILE_T
from sparsekern.kernels.gpu.scores import SKETCH_BYTES, lists_of, project
from torch import Tensor


def conv2d_block_norms(
    dy: Tensor, x: Tensor, row: Tensor, col: Tensor, block: tuple[int, int], shape: ConvShape
) -> Tensor:
    """Return the norms ``(K,)``; see :meth:`sparsekern.kernels.contract.Backend.conv2d_block_norms`."""
    norms = torch.empty(row.shape[0], dtype=torch.float32, device=x.device)
    lists = lists_of(row, col, shape.groups * shape.block_rows(block[0]))
    outer_blocks("conv2d_block_norms", dy, x, lists, row.shape[0], block, shape, norms)
    return norms


def conv2d_all_block_norms(dy: Tensor, x: Tensor, block: tuple[int, int], shape: ConvShape) -> Tensor:
    """Return the norms ``(R, C)``; see :meth:`sparsekern.kernels.contract.Backend.conv2d_all_block_norms`."""
    (bo, bi), (images, _, height_out, width_out), groups = block, dy.shape, shape.groups
    rows, per_tap, tokens = shape.block_rows(bo), shape.block_cols(bi), images * height_out * width_out
    norms = torch.empty(groups * rows, shape.taps * per_tap, dtype=torch.float32, device=x.device)
    if tokens == 0:
        return norms.zero_()
    (height, width), (top, _, left, _) = x.shape[2:], shape.padding
    x, dy = aligned_images(x, groups), aligned_images(dy, groups)
    align, precision = alignment(x.dtype), dot_precision(x.dtype)

    def launch(config: Config) -> None:
        assert isinstance(config, Supertile)
        tiles = triton.cdiv(rows * bo, config.tile_out), triton.cdiv(per_tap * bi, config.tile_in)
        conv2d_supertile_kernel[(*tiles, groups * shape.taps)](
            dy, x, norms,
            tokens, groups, rows, height, width, height_out, width_out,
            shape.taps, per_tap, shape.kernel[1], top, left, *shape.dilation,
            shape.group_in, shape.group_out, x.shape[4] // align, dy.shape[4] // align,
            ALIGN=align, BO=bo, BI=bi, STRIDE_Y=shape.stride[0], STRIDE_X=shape.stride[1],
            TILE_OUT=config.tile_out, TILE_IN=config.tile_in, TILE_T=config.tile_t, PRECISION=precision,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    name = "conv2d_all_block_norms"
    which = problem(name, arch(x.device), x.dtype, precision, block, tokens, norms.numel(), groups * rows)
    with on_device_of(x):
        launch(tables.choose(which, launch))
    return norms


def conv2d_sketch(dy: Tensor, x: Tensor, u: Tensor, v: Tensor, block: tuple[int, int], shape: ConvShape) -> Tensor:
    """Return ``(r, R, C)``; see :meth:`sparsekern.kernels.contract.Backend.conv2d_sketch`.

    As :func:`sparsekern.kernels.gpu.scores.sketch`: pixels of dy, and of x as each tap sees them, are projected first.
    """
    (bo, bi), pairs, groups = block, u.shape[0], shape.groups
    rows, cols = shape.block_rows(bo), shape.taps * shape.block_cols(bi)
    total = torch.zeros(pairs, groups, rows, cols, dtype=torch.float32, device=x.device)
    tokens = dy.permute(0, 2, 3, 1).reshape(-1, shape.out_channels)
    panel = max(TILE_T, SKETCH_BYTES // max(1, 4 * pairs * groups * (rows + cols)) // TILE_T * TILE_T)
    for start in range(0, tokens.shape[0] if pairs else 0, panel):
        part = tokens[start : start + panel]
        right = _project(x, v, (start, part.shape[0]), (dy.shape[2], dy.shape[3]), bi, shape)
        for group, (of_group, directions) in enumerate(zip(part.chunk(groups, 1), u.chunk(groups, 1), strict=True)):
            total[:, group] += project(of_group, directions, bo) @ right[:, group].transpose(1, 2)
    return total.flatten(1, 2)


def _project(
    x: Tensor, directions: Tensor, pixels: tuple[int, int], size_out: tuple[int, int], side: int, shape: ConvShape
) -> Tensor:
    """Return ``(r, groups, C, T)`` for ``pixels``: the first one of y and how many, T."""
    (first, tokens), pairs, per_tap = pixels, directions.shape[0], shape.block_cols(side)
    (height, width), (top, _, left, _) = x.shape[2:], shape.padding
    out = torch.empty(pairs, shape.groups, shape.taps * per_tap, tokens, dtype=torch.float32, device=x.device)
    with on_device_of(x):
        conv2d_projection_kernel[(triton.cdiv(tokens, TILE_T) * shape.groups * shape.taps * per_tap,)](
            x, directions.float().contiguous(), out,
            first, tokens, shape.groups, shape.group_in, height, width, *size_out,
            shape.taps, per_tap, shape.kernel[1], top, left, *shape.dilation, pairs,
            SIDE=side, TILE_T=TILE_T, STRIDE_Y=shape.stride[0], STRIDE_X=shape.stride[1],
            num_warps=8 if side == 128 else 4,
        )  # fmt: skip
    return out
