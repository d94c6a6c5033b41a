"""Sums over tokens of what each input and each output unit sees: the two vectors whose product guides GSE's draws.

Sums add up over micro-batches and ranks. Neither vector needs the weight's gradient ``G = dy' x``.

A convolution is a linear layer on windows of ``kh * kw * Cin`` entries, every output position a token. The windows are
never laid out: which pixels a tap sees follows from the geometry. Each group sees windows of its own channels.

    dy  (T, O), or (N, Cout, Ho, Wo)    x  (T, I), or (N, Cin, H, W)    images channels last
    R, C: block rows and columns of the grid
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsekern.kernels.contract import ConvShape, Geometry, accumulate_dtype
from sparsekern.ops.library import as_tokens

Box = tuple[slice, slice, slice]

GOLDEN = -7046029254386353131
"""2**64 over the golden ratio, as int64: the step of SplitMix64's counter."""

EXPONENTS = {
    torch.float16: (torch.int16, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float32: (torch.int32, 0x7F800000),
    torch.float64: (torch.int64, 0x7FF << 52),
}
"""For each float dtype: integers of its size, to read its bits as, and the bits that are the exponent."""


def magnitudes(dy: Tensor, x: Tensor, block: tuple[int, int], geometry: Geometry) -> Tensor:
    """Return ``(R + C,)``: how much block rows see of dy and block columns of x, summed over tokens.

    At 1x1 the sums of absolute values, as in GraBo (Heddes et al. 2024, appendix A): ``|G| <= (|dy|' 1)(1' |x|)``.
    For blocks the sums of squares: ``|dy_J' x_I|_F <= |dy_J|_F |x_I|_F``. A convolution has the C columns once a group.
    """
    power = 1 if block == (1, 1) else 2
    out = sum_powers(as_tokens(dy), power)
    if isinstance(geometry, ConvShape):
        out = out.view(geometry.groups, geometry.group_out)
        pixels = sum_powers(x.permute(0, 2, 3, 1), power).unsqueeze(0)  # over the images: (1, H, W, Cin)
        columns = _by_group(_sum_windows(pixels.new_ones(1, *dy.shape[2:]), pixels, geometry), geometry)
    else:
        columns = sum_powers(x, power)
    return torch.cat([sums_of_blocks(side, n).flatten() for side, n in zip((out, columns), block, strict=True)])


def sum_powers(side: Tensor, power: int) -> Tensor:
    """Return the sums over the first axis of absolute values, for ``power`` 1, or of squares, for 2."""
    acc = accumulate_dtype(side.dtype)
    total = torch.zeros(side.shape[1:], dtype=acc, device=side.device)
    for some in parts(side):  # a norm along the first axis takes five times as long on a CPU
        total += (some.abs() if power == 1 else some.to(acc).square()).sum(0, dtype=acc)
    return total


def parts(side: Tensor) -> tuple[Tensor, ...]:
    """Cut the first axis so that a temporary of each part is small: no copy of all, and on a CPU in its cache."""
    pieces: tuple[Tensor, ...] = side.split(max(1, part_numbers(side) // max(1, side.shape[1:].numel())))
    return pieces


def part_numbers(side: Tensor) -> int:
    """Return how many numbers a part of a tensor has at most."""
    return 2**18 if side.device.type == "cpu" else 2**24


def sums_of_blocks(sums: Tensor, length: int) -> Tensor:
    """Add up the last axis ``(..., F)`` in blocks: ``(..., ceil(F / length))``."""
    blocks: Tensor = pad(sums, (0, -sums.shape[-1] % length)).unflatten(-1, (-1, length))
    return blocks.sum(-1)


def signed_sums(dy: Tensor, x: Tensor, seed: Tensor, geometry: Geometry) -> Tensor:
    """Return ``(O + I,)``: the sums over tokens of ``s dy`` and ``s x``, with one random sign a token for both.

    The product of an entry of each is an unbiased estimate of an element of G (the sketch of Alon, Matias and Szegedy,
    with which GraEst draws), also of sums over several backwards: see :func:`token_signs`.

    Args:
        dy: as above.
        x: as above.
        seed: ``()`` int64, random.
        geometry: of the layer. A convolution has windows for x, those of each group behind one another: the result is
            ``(Cout + groups * kh * kw * Cin / groups,)``.
    """
    acc, flat_dy, flat_x = accumulate_dtype(x.dtype), as_tokens(dy), as_tokens(x)
    signs = token_signs(flat_dy, flat_x, seed, flat_dy.shape[0]).to(x.dtype)
    if isinstance(geometry, ConvShape):
        windows = _sum_windows(signs.view(dy.shape[0], *dy.shape[2:]), x.permute(0, 2, 3, 1), geometry).to(acc)
        return torch.cat([(signs @ flat_dy).to(acc), _by_group(windows, geometry).flatten()])
    total = torch.zeros(dy.shape[1] + x.shape[1], dtype=acc, device=x.device)
    tokens = max(1, part_numbers(x) // max(1, total.shape[0]))
    for some, some_dy, some_x in zip(signs.split(tokens), dy.split(tokens), x.split(tokens), strict=True):
        total[: dy.shape[1]] += (some @ some_dy).to(acc)
        total[dy.shape[1] :] += (some @ some_x).to(acc)
    return total


def token_signs(dy: Tensor, x: Tensor, seed: Tensor, tokens: int) -> Tensor:
    """Return independent, fair signs ``(tokens,)``, -1 or 1, int64.

    A counter hashed with a key. The key is a hash of the seed and of the bits of dy and x, so that backwards of other
    batches have other signs without a state that counts them: were they the same in every batch, the products between
    batches would not cancel. Only batches that are equal to the bit share theirs. Exponents play no part, so that
    gradient scaling, by powers of two, changes no sign.

    Args:
        dy: ``(T, O)``.
        x: ``(T, I)``, or of a convolution the pixels ``(P, I)``.
        seed: ``()`` int64.
        tokens: how many signs.
    """
    key = _mixed(seed ^ _mixed(_content(dy) ^ _mixed(_content(x))))
    counter = torch.arange(tokens, dtype=torch.int64, device=x.device)
    return torch.where(_mixed(counter * GOLDEN + key) < 0, -1, 1)


def _content(side: Tensor) -> Tensor:
    """Return a hash ``()`` of signs and mantissas of a tensor ``(n, m)`` and of where they are on its first axis."""
    integers, exponent = EXPONENTS[side.dtype]
    sums = torch.cat([(some.view(integers) & ~exponent).sum(1, dtype=torch.int64) for some in parts(side)])
    return _mixed(torch.arange(sums.shape[0], dtype=torch.int64, device=sums.device) * GOLDEN + sums).sum()


def _mixed(z: Tensor) -> Tensor:
    """Return the finaliser of SplitMix64 (Steele, Lea and Flood 2014) of int64 ``z``: all bits depend on all of its."""
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * -4658895280553007687  # int64 has no logical shift, hence the masks
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * -7723592293110705685
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def _by_group(windows: Tensor, geometry: ConvShape) -> Tensor:
    """Return sums of windows ``(taps, Cin)`` as ``(groups, taps, Cin / groups)``."""
    return windows.view(geometry.taps, geometry.groups, geometry.group_in).transpose(0, 1)


def _sum_windows(weights: Tensor, pixels: Tensor, geometry: ConvShape) -> Tensor:
    """Return ``(taps, Cin)``: what each tap sees of ``pixels (N, H, W, Cin)``, with a weight ``(N, Ho, Wo)`` a token.

    The weights are put where the tap looks, some taps at a time, and multiplied by all pixels: so these are not copied.
    """
    images, height, width, channels = pixels.shape
    parts = []
    for taps in _some_taps(geometry):
        spread = weights.new_zeros(taps.stop - taps.start, images, height, width)
        for place, tap in enumerate(range(taps.start, taps.stop)):
            there, here = _seen(geometry, tap, (weights.shape[1], weights.shape[2]), (height, width))
            spread[place][here] = weights[there]
        parts.append(spread.flatten(1) @ pixels.reshape(-1, channels))
    return torch.cat(parts)


def _some_taps(geometry: ConvShape) -> Iterator[slice]:
    """Yield all taps, no more at a time than there are channels: a number a tap and pixel is then no more than x."""
    for first in range(0, geometry.taps, geometry.in_channels):
        yield slice(first, min(first + geometry.in_channels, geometry.taps))


def _seen(geometry: ConvShape, tap: int, size_out: tuple[int, int], size: tuple[int, int]) -> tuple[Box, Box]:
    """Return the tokens ``(N, Ho, Wo)`` whose pixel at this tap is not padding, and these pixels ``(N, H, W)``."""
    there, here = [slice(None)], [slice(None)]
    first = tap // geometry.kernel[1] * geometry.dilation[0], tap % geometry.kernel[1] * geometry.dilation[1]
    for axis, before in ((0, geometry.padding[0]), (1, geometry.padding[2])):
        step, shift = geometry.stride[axis], first[axis] - before  # token k sees pixel k * step + shift
        start = max(0, -(shift // step))
        stop = max(start, min(size_out[axis], (size[axis] - 1 - shift) // step + 1))
        there.append(slice(start, stop))
        here.append(slice(max(0, start * step + shift), max(0, (stop - 1) * step + shift + 1), step))
    return (there[0], there[1], there[2]), (here[0], here[1], here[2])
