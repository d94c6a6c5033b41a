"""What each channel of dy and each entry of a window sees of a batch: :mod:`sparsekern.ops.marginals` of convolutions.

A convolution is a linear layer on windows of ``kh * kw * Cin`` entries, every output position a token. The windows are
never laid out: which pixels a tap sees follows from the shape. Groups see windows of their own channels.

    dy  (N, Cout, Ho, Wo)    x  (N, Cin, H, W)    both channels last; R, C: block rows and columns of the grid
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from sparsekern.kernels.contract import ConvShape, accumulate_dtype
from sparsekern.ops.marginals import sum_powers, sums_of_blocks, token_signs

Box = tuple[slice, slice, slice]


def magnitudes(dy: Tensor, x: Tensor, block: tuple[int, int], shape: ConvShape) -> Tensor:
    """Return ``(R + groups * C,)``: how much block rows see of dy, then for each group how much block columns of x.

    Sums of absolute values at 1x1, else of squares, as :func:`sparsekern.ops.marginals.magnitudes`.
    """
    power = 1 if block == (1, 1) else 2
    out = sum_powers(dy.permute(0, 2, 3, 1).flatten(0, 2), power).view(shape.groups, shape.group_out)
    pixels = sum_powers(x.permute(0, 2, 3, 1), power).unsqueeze(0)  # over the images: (1, H, W, Cin)
    ones = pixels.new_ones(1, *dy.shape[2:])
    windows = _sum_windows(ones, pixels, shape).view(shape.taps, shape.groups, shape.group_in).transpose(0, 1)
    return torch.cat([sums_of_blocks(out, block[0]).flatten(), sums_of_blocks(windows, block[1]).flatten()])


def signed_sums(dy: Tensor, x: Tensor, seed: Tensor, shape: ConvShape) -> Tensor:
    """Return ``(Cout + groups * kh * kw * Cin / groups,)``: sums over tokens of ``s dy`` and of ``s`` times the window.

    One random sign a token, the same for all groups; see :func:`sparsekern.ops.marginals.signed_sums`.

    Args:
        dy, x: as above.
        seed: ``()`` int64, random.
        shape: of the convolution.
    """
    acc, size = accumulate_dtype(x.dtype), (dy.shape[0], *dy.shape[2:])
    positions, pixels = dy.permute(0, 2, 3, 1).flatten(0, 2), x.permute(0, 2, 3, 1)
    signs = token_signs(positions, pixels.flatten(0, 2), seed, math.prod(size)).to(x.dtype)
    out = (signs @ positions).to(acc)
    windows = _sum_windows(signs.view(size), pixels, shape).to(acc)
    return torch.cat([out, windows.view(shape.taps, shape.groups, shape.group_in).transpose(0, 1).flatten()])


def _sum_windows(weights: Tensor, pixels: Tensor, shape: ConvShape) -> Tensor:
    """Return ``(taps, Cin)``: what each tap sees of ``pixels (N, H, W, Cin)``, with a weight ``(N, Ho, Wo)`` a token.

    The weights are put where the tap looks, some taps at a time, and multiplied by all pixels: so these are not copied.
    """
    images, height, width, channels = pixels.shape
    parts = []
    for taps in _some_taps(shape):
        spread = weights.new_zeros(taps.stop - taps.start, images, height, width)
        for place, tap in enumerate(range(taps.start, taps.stop)):
            there, here = _seen(shape, tap, (weights.shape[1], weights.shape[2]), (height, width))
            spread[place][here] = weights[there]
        parts.append(spread.flatten(1) @ pixels.reshape(-1, channels))
    return torch.cat(parts)


def _some_taps(shape: ConvShape) -> Iterator[slice]:
    """Yield all taps, no more at a time than there are channels: a number a tap and pixel is then no more than x."""
    for first in range(0, shape.taps, shape.in_channels):
        yield slice(first, min(first + shape.in_channels, shape.taps))


def _seen(shape: ConvShape, tap: int, size_out: tuple[int, int], size: tuple[int, int]) -> tuple[Box, Box]:
    """Return the tokens ``(N, Ho, Wo)`` whose pixel at this tap is not padding, and these pixels ``(N, H, W)``."""
    there, here = [slice(None)], [slice(None)]
    first = tap // shape.kernel[1] * shape.dilation[0], tap % shape.kernel[1] * shape.dilation[1]
    for axis, before in ((0, shape.padding[0]), (1, shape.padding[2])):
        step, shift = shape.stride[axis], first[axis] - before  # token k sees pixel k * step + shift
        start = max(0, -(shift // step))
        stop = max(start, min(size_out[axis], (size[axis] - 1 - shift) // step + 1))
        there.append(slice(start, stop))
        here.append(slice(max(0, start * step + shift), max(0, (stop - 1) * step + shift + 1), step))
    return (there[0], there[1], there[2]), (here[0], here[1], here[2])
