"""The sizes of a transformed layer, from one sparsity: Thangarasa et al., "Sparse-IFT", ICML 2024, section 3."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sparsekern.topology import block_pair

SMALLEST_MULTIPLE = 8
"""Widths and ranks are multiples of this at least: odd ones are slow on any hardware."""


@dataclass(frozen=True)
class Width:
    """How wide a network is to be built: ``width(512)`` is what 512 features become.

    Args:
        multiplier: times as wide, 1 or more.
        multiple: what a width is rounded to: the nearest, but never fewer features than the dense network has.
    """

    multiplier: float = 1.0
    multiple: int = 1

    def __call__(self, features: int) -> int:
        """Return the features of a layer that has so many in the dense network."""
        nearest = math.floor(features * self.multiplier / self.multiple + 0.5)
        return self.multiple * max(nearest, -(-features // self.multiple))


def wide_width(sparsity: float, block_size: int | tuple[int, int]) -> Width:
    """Return the width of a Sparse Wide network: ``sqrt(1 / (1 - s))`` times, in whole blocks."""
    return Width(math.sqrt(1 / (1 - sparsity)), math.lcm(SMALLEST_MULTIPLE, *block_pair(block_size)))


def parallel_branches(sparsity: float) -> int:
    """Return the branches of Sparse Parallel: ``1 / (1 - s)`` to the nearest, halves up."""
    return math.floor(1 / (1 - sparsity) + 0.5)


def factorized_features(inputs: int, outputs: int, sparsity: float, multiple: int) -> int:
    """Return d of Sparse Factorized, ``in * out / ((in + out) (1 - s))``, rounded up to a multiple.

    Args:
        inputs: of the first factor; of a convolution its taps times the input channels.
        outputs: of the second factor.
        sparsity: of both.
        multiple: side of the blocks.
    """
    features = inputs * outputs / ((inputs + outputs) * (1 - sparsity))
    return multiple * math.ceil(features / multiple - 1e-9)


def doped_rank(inputs: int, outputs: int, sparsity: float) -> int:
    """Return the rank of the dense path of Sparse Doped, ``s * in * out / (in + out)``, to a multiple of 8.

    Rounded down, so that the sparse path keeps its share; 1 at least.
    """
    rank = math.floor(sparsity * inputs * outputs / (inputs + outputs) + 1e-9)
    return rank // SMALLEST_MULTIPLE * SMALLEST_MULTIPLE or max(1, rank)
