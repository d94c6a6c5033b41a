"""What the linear layer is to reach on an H200: bf16, T >= 8192, K = N = 4096, random topology, a whole step."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

ORDER = (128, 64, 32, 16)
"""Sides of blocks, as they are tuned, raced and shown."""

DEVICE = "H200"
TOKENS, FEATURES, DTYPE = 8192, 4096, "bf16"


class Goal(NamedTuple):
    """Speed-ups over cuBLAS in the same run, ``(must, aim)`` by sparsity, and where both are equally fast."""

    speedup: dict[float, tuple[float, float]]
    break_even: float
    """A sparsity, at most."""


GOALS = {
    128: Goal({0.9: (6.5, 8.5), 0.95: (12.0, 16.0)}, 0.25),
    64: Goal({0.9: (4.0, 5.5), 0.95: (7.5, 10.5)}, 0.45),
    32: Goal({0.9: (2.2, 3.2), 0.95: (4.2, 6.0)}, 0.68),
    16: Goal({0.9: (1.2, 1.8), 0.95: (2.3, 3.5)}, 0.82),
}


CONV2D_MUST = 3.0
"""Speed-up of a step over cuDNN, channels last: blocks of 64, 90 % sparse, 256 channels or more."""

AROUND_BREAK_EVEN = {128: (0.25, 0.5), 64: (0.4, 0.5), 32: (0.6, 0.7), 16: (0.8, 0.85)}
"""Sparsities that tell whether that is so, by block."""


def verdict(measured: float, must: float, aim: float) -> str:
    """Return in a word how a speed-up compares with its goal."""
    return "reached aim" if measured >= aim else "reached must" if measured >= must else "MISSED"


def break_even(points: dict[float, float]) -> tuple[float, str] | None:
    """Return the sparsity at which the speed-up is 1 and how it was found, from ``{sparsity: speed-up}``.

    The sparse time is close to linear in the number of blocks, so its ratio to the dense time is interpolated. Where
    nothing measured is slower (or faster) than dense, the answer is a bound.
    """
    ratios = sorted((sparsity, 1 / speedup) for sparsity, speedup in points.items() if speedup > 0)
    if not ratios:
        return None
    for (low, slow), (high, fast) in pairwise(ratios):
        if slow >= 1 >= fast and slow > fast:
            return low + (high - low) * (slow - 1) / (slow - fast), "="
    if ratios[-1][1] > 1:
        return ratios[-1][0], ">"
    return ratios[0][0], "<"
