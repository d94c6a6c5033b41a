"""Scores of the blocks of a convolution's gradient, which is never formed; as :mod:`sparsekern.ops.scores`.

``shape`` is what :func:`sparsekern.ops.shapes.pack_shape` makes of the sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from sparsekern.kernels.contract import accumulate_dtype
from sparsekern.ops.backends import backend_for
from sparsekern.ops.library import define
from sparsekern.ops.scores import autograd_kernel
from sparsekern.ops.shapes import channels_last, unpack_shape


def _run_block_norms(
    dy: Tensor, x: Tensor, row: Tensor, col: Tensor, bo: int, bi: int, shape: list[int], backend: str
) -> Tensor:
    chosen = backend_for(backend, "conv2d", x, (bo, bi))
    return chosen.conv2d_block_norms(channels_last(dy), channels_last(x), row, col, (bo, bi), unpack_shape(shape))


def _run_all_block_norms(dy: Tensor, x: Tensor, bo: int, bi: int, shape: list[int], backend: str) -> Tensor:
    chosen = backend_for(backend, "conv2d", x, (bo, bi))
    return chosen.conv2d_all_block_norms(channels_last(dy), channels_last(x), (bo, bi), unpack_shape(shape))


def _run_sketch(
    dy: Tensor, x: Tensor, u: Tensor, v: Tensor, bo: int, bi: int, shape: list[int], backend: str
) -> Tensor:
    chosen = backend_for(backend, "conv2d", x, (bo, bi))
    return chosen.conv2d_sketch(channels_last(dy), channels_last(x), u, v, (bo, bi), unpack_shape(shape))


def _cells(shape: list[int], bo: int, bi: int) -> tuple[int, int]:
    sizes = unpack_shape(shape)
    return sizes.groups * sizes.block_rows(bo), sizes.taps * sizes.block_cols(bi)


def _fake_block_norms(dy: Tensor, x: Tensor, row: Tensor, *_: Any) -> Tensor:
    return x.new_empty(row.shape[0], dtype=accumulate_dtype(x.dtype))


def _fake_all_block_norms(dy: Tensor, x: Tensor, bo: int, bi: int, shape: list[int], backend: str) -> Tensor:
    return x.new_empty(_cells(shape, bo, bi), dtype=accumulate_dtype(x.dtype))


def _fake_sketch(
    dy: Tensor, x: Tensor, u: Tensor, v: Tensor, bo: int, bi: int, shape: list[int], backend: str
) -> Tensor:
    return x.new_empty(u.shape[0], *_cells(shape, bo, bi), dtype=accumulate_dtype(x.dtype))


block_norms: Callable[..., Tensor] = define(
    "conv2d_block_norms",
    "(Tensor dy, Tensor x, Tensor row, Tensor col, int bo, int bi, int[] shape, str backend) -> Tensor",
    fake=_fake_block_norms,
    run=_run_block_norms,
    autograd=autograd_kernel("conv2d_block_norms"),
)
"""Frobenius norms ``(K,)`` of the blocks ``(row[k], col[k])``; float32 (float64 for float64)."""

all_block_norms: Callable[..., Tensor] = define(
    "conv2d_all_block_norms",
    "(Tensor dy, Tensor x, int bo, int bi, int[] shape, str backend) -> Tensor",
    fake=_fake_all_block_norms,
    run=_run_all_block_norms,
    autograd=autograd_kernel("conv2d_all_block_norms"),
)
"""Frobenius norms ``(R, C)`` of all blocks; float32 (float64 for float64)."""

sketch: Callable[..., Tensor] = define(
    "conv2d_sketch",
    "(Tensor dy, Tensor x, Tensor u, Tensor v, int bo, int bi, int[] shape, str backend) -> Tensor",
    fake=_fake_sketch,
    run=_run_sketch,
    autograd=autograd_kernel("conv2d_sketch"),
)
"""``u[q]' G v[q]`` of every block, ``(r, R, C)``; float32 (float64 for float64)."""
