"""What each input and output unit sees of a batch: the two vectors whose product guides GSE's draws.

Both are sums over tokens, so they add up over micro-batches and ranks. Neither needs the gradient ``G = dy' x``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsekern.kernels.contract import accumulate_dtype

GOLDEN = -7046029254386353131
"""2**64 over the golden ratio, as int64: the step of SplitMix64's counter."""

EXPONENTS = {
    torch.float16: (torch.int16, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float32: (torch.int32, 0x7F800000),
    torch.float64: (torch.int64, 0x7FF << 52),
}
"""Of a float: integers of its size, to read its bits as, and which of them are the exponent."""


def magnitudes(dy: Tensor, x: Tensor, block: tuple[int, int]) -> Tensor:
    """Return ``(R + C,)``: how much block rows see of dy and block columns of x, summed over tokens.

    At 1x1 the sums of absolute values, as in GraBo (Heddes et al. 2024, appendix A): ``|G| <= (|dy|' 1)(1' |x|)``.
    For blocks the sums of squares: ``|dy_J' x_I|_F <= |dy_J|_F |x_I|_F``.
    """
    power = 1 if block == (1, 1) else 2
    return torch.cat([sums_of_blocks(sum_powers(side, power), n) for side, n in zip((dy, x), block, strict=True)])


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


def signed_sums(dy: Tensor, x: Tensor, seed: Tensor) -> Tensor:
    """Return ``(O + I,)``: the sums over tokens of ``s dy`` and ``s x``, with one random sign a token for both.

    The product of an entry of each is an unbiased estimate of an element of G (the sketch of Alon, Matias and Szegedy,
    with which GraEst draws), also of sums over several backwards: see :func:`token_signs`.

    Args:
        dy: ``(T, O)``.
        x: ``(T, I)``.
        seed: ``()`` int64, random.
    """
    acc = accumulate_dtype(x.dtype)
    total = torch.zeros(dy.shape[1] + x.shape[1], dtype=acc, device=x.device)
    tokens = max(1, part_numbers(x) // max(1, total.shape[0]))
    signs = token_signs(dy, x, seed, x.shape[0]).to(x.dtype)
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
