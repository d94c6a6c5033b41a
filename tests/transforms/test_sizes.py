"""The sizes of the paper's table 1, rounded to blocks."""

from __future__ import annotations

import pytest

from sparsekern.transforms.sizes import Width, doped_rank, factorized_features, parallel_branches, wide_width


@pytest.mark.parametrize(
    ("sparsity", "block", "widths"),
    [(0.9, 32, (2432, 9728)), (0.9, 64, (2432, 9728)), (0.5, 64, (1088, 4352)), (0.5, 128, (1024, 4352))],
)
def test_widths_by_hand(sparsity, block, widths):
    """768 and 3072 features; at 0.5 1086.1 is nearest to 1088, and to 8 x 128 = 1024."""
    width = wide_width(sparsity, block)
    assert (width(768), width(3072)) == widths


def test_a_width_never_shrinks_and_small_blocks_make_multiples_of_8():
    assert wide_width(0.1, 32)(100) == 128  # 105.4 is nearest to 96
    assert wide_width(0.5, 1).multiple == 8 and wide_width(0.5, 1)(100) == 144  # 141.4
    assert wide_width(0.5, (16, 12)).multiple == 48
    assert [Width()(n) for n in (1, 7, 100)] == [1, 7, 100]


def test_branches():
    assert [parallel_branches(s) for s in (0.0, 0.3, 0.5, 0.6, 0.75, 0.9)] == [1, 1, 2, 3, 4, 10]


def test_factors_by_hand():
    """Square: D / (2 (1 - s)). 3 x 3 convolution of c channels: 0.9 c / (1 - s). Rounded up."""
    assert [factorized_features(512, 512, s, 16) for s in (0.5, 0.75, 0.9)] == [512, 1024, 2560]
    assert factorized_features(9 * 64, 64, 0.5, 1) == 116  # 115.2
    assert factorized_features(9 * 64, 64, 0.5, 16) == 128


def test_ranks_by_hand():
    """Square: s D / 2. 3 x 3 convolution: 0.9 s c, rounded down to a multiple of 8."""
    assert [doped_rank(512, 512, s) for s in (0.5, 0.75, 0.9)] == [128, 192, 224]  # 230.4
    assert doped_rank(9 * 64, 64, 0.9) == 48  # 51.8
    assert doped_rank(8, 8, 0.9) == 3 and doped_rank(8, 8, 0.1) == 1
