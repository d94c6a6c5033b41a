"""What a probe hears in the backward of a convolution; as :mod:`sparsekern.ops.linear_answers`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsekern.kernels.contract import ConvShape
from sparsekern.ops import conv2d_marginals, conv2d_scores
from sparsekern.ops.linear_answers import counted
from sparsekern.ops.shapes import channels_last, pack_shape, unpack_shape


def answer(
    kind: str,
    dy: Tensor,
    x: Tensor,
    args: list[Tensor],
    block: tuple[int, int],
    shape: list[int],
    dtype: torch.dtype,
    backend: str,
    tokens: int,
) -> Tensor:
    """Return the gradient of a probe; :class:`sparsekern.ops.probes.Probe` says what each kind asks for.

    Args:
        kind, args, tokens: of the probe; a token is an output position.
        dy: ``(N, Cout, Ho, Wo)``, channels last.
        x: ``(N, Cin, H, W)``, channels last.
        block: ``(bo, bi)``.
        shape: of the convolution, packed.
        dtype: of the result.
        backend: by name.
    """
    (bo, bi), (dy, x, sizes) = block, spread(dy, x, unpack_shape(shape), tokens)
    if kind == "magnitudes":
        return conv2d_marginals.magnitudes(dy, x, block, sizes).to(dtype)
    if kind == "signed_sums":
        return conv2d_marginals.signed_sums(dy, x, args[0], sizes).to(dtype)
    shape = pack_shape(sizes)
    if kind == "candidates":
        blocks: Tensor = torch.ops.sparsekern.conv2d_dvalues.default(dy, x, args, bo, bi, shape, dtype, backend)
        return blocks
    if kind == "norms":
        return conv2d_scores.block_norms(dy, x, args[0], args[1], bo, bi, shape, backend).to(dtype)
    if kind == "all_norms":
        return conv2d_scores.all_block_norms(dy, x, bo, bi, shape, backend).to(dtype)
    if kind == "counted_norms":
        return counted(conv2d_scores.all_block_norms(dy, x, bo, bi, shape, backend).to(dtype))
    return conv2d_scores.sketch(dy, x, args[0], args[1], bo, bi, shape, backend).to(dtype)


def spread(dy: Tensor, x: Tensor, shape: ConvShape, tokens: int) -> tuple[Tensor, Tensor, ConvShape]:
    """Return at most so many tokens on a regular lattice, and the convolution that has only these; all of them for 0.

    Output positions are thinned before images, for what neighbours say is much the same: the rows and columns that stay
    are those of a convolution with larger strides.
    """
    images, _, *size_out = dy.shape
    if tokens == 0 or images * size_out[0] * size_out[1] <= tokens:
        return dy, x, shape
    rows, cols = _side_lengths(max(1, tokens // images), size_out[0], size_out[1])
    rows_of, cols_of = _thin(shape, 0, x.shape[2], size_out[0], rows), _thin(shape, 1, x.shape[3], size_out[1], cols)
    if rows_of is None or cols_of is None:
        return dy, x, shape  # the positions that would stay see nothing but padding
    (above, below, high, wide), (left, right, begin, end) = rows_of[1], cols_of[1]
    some = slice(None, None, max(1, images // tokens))
    dy = dy[some, :, rows_of[0], cols_of[0]][:tokens]
    x = x[some, :, high:wide, begin:end][:tokens]
    stride = shape.stride[0] * rows_of[0].step, shape.stride[1] * cols_of[0].step
    return channels_last(dy), channels_last(x), shape._replace(stride=stride, padding=(above, below, left, right))


def _side_lengths(positions: int, height: int, width: int) -> tuple[int, int]:
    """Return rows and columns of a lattice of at most so many positions, in about the proportions of the image."""
    rows = min(height, positions, max(1, math.isqrt(positions * height // width)))
    cols = min(width, positions // rows)
    return min(height, positions // cols), cols


def _thin(
    shape: ConvShape, axis: int, size: int, size_out: int, count: int
) -> tuple[slice, tuple[int, int, int, int]] | None:
    """Return which of the output's rows (axis 0) or columns (1) stay, and what they see of ``size`` rows of the input.

    That is the padding before and behind, and the first and last row; None if it is padding only.
    """
    every = size_out // count
    first = (every - 1) // 2  # in the middle: the edge of an image is not like the rest
    kept = slice(first, first + every * (count - 1) + 1, every)
    start = first * shape.stride[axis] - shape.padding[2 * axis]
    stop = start + every * (count - 1) * shape.stride[axis] + (shape.kernel[axis] - 1) * shape.dilation[axis] + 1
    if start >= size or stop <= 0:
        return None
    return kept, (max(0, -start), max(0, stop - size), max(0, start), min(size, stop))
