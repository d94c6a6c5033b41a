"""What each input and output unit sees of a batch: the two vectors whose product guides GSE's draws.

Both are sums over tokens, so they add up over micro-batches and ranks. Neither needs the gradient ``G = dy' x``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsekern.kernels.contract import accumulate_dtype


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


def signed_sums(dy: Tensor, x: Tensor, hash_out: Tensor, hash_in: Tensor) -> Tensor:
    """Return ``(O + I,)``: the sums over tokens of ``s dy`` and ``s x``, with one random sign a token for both.

    The product of an entry of each is an unbiased estimate of an element of G (the sketch of Alon, Matias and Szegedy,
    with which GraEst draws). The sign of a token is a hash of where its x is positive and its dy negative: so it needs
    no random numbers in the backward, and depends neither on how a batch is split nor, but for entries around zero, on
    rounding. Tokens that differ there have signs that are independent in pairs.

    Args:
        dy: ``(T, O)``.
        x: ``(T, I)``.
        hash_out: ``(O,)`` of 0 and 1, independent and equally likely, float32 or float64.
        hash_in: ``(I,)``, likewise.
    """
    acc = accumulate_dtype(x.dtype)
    total = torch.zeros(dy.shape[1] + x.shape[1], dtype=acc, device=x.device)
    tokens = max(1, part_numbers(x) // max(1, total.shape[0]))
    for some_dy, some_x in zip(dy.split(tokens), x.split(tokens), strict=True):  # then each is in the cache
        signs = token_signs(some_dy, some_x, hash_out, hash_in).to(x.dtype)
        total[: dy.shape[1]] += (signs @ some_dy).to(acc)
        total[dy.shape[1] :] += (signs @ some_x).to(acc)
    return total


def token_signs(dy: Tensor, x: Tensor, hash_out: Tensor, hash_in: Tensor) -> Tensor:
    """Return the signs ``(T,)``, -1 or 1; the arguments are those of :func:`signed_sums`.

    The parity of how many of the entries in question the hash holds; counted in floats, which are exact to 2**24.
    """
    count = (dy < 0).to(hash_out.dtype) @ hash_out
    count += (x > 0).to(hash_in.dtype) @ hash_in
    return 1 - 2 * count.remainder(2)
