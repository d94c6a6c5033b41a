"""The native linear kernels against the oracle, on every instruction set that the machine has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from sparsekern.kernels import cpu

from tests.kernels.cpu.calls import (
    DTYPES,
    PLAIN,
    SQUARES,
    check_backward_is_dx_and_dvalues,
    dvalues,
    dx,
    fwd,
    large_case,
    small_case,
    with_block,
)
from tests.oracle import DY_LAYOUTS, X_LAYOUTS, check_dvalues, check_dx, check_kernels, random_case

pytestmark = pytest.mark.usefixtures("instructions", "poisoned_memory")

RECTANGLES = ((16, 32), (32, 16), (64, 16), (16, 128), (128, 32), (64, 128))
TOKENS = (0, 1, 2, 8, 9, 15, 16, 17, 100, 300)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [*SQUARES, *RECTANGLES])
def test_all_blocks_and_dtypes(block: tuple[int, int], dtype: torch.dtype) -> None:
    for seed in range(2):
        check_kernels(cpu, random_case(seed, block=block, dtype=dtype))


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("block", [(1, 1), (32, 32), (128, 16)])
def test_any_number_of_tokens_and_threads(block: tuple[int, int], tokens: int, threads: Callable[[int], None]) -> None:
    case = large_case(block, tokens=tokens)
    for count in (1, 2, 3) if tokens == 300 else (2,):
        threads(count)
        check_kernels(cpu, case)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_wider_than_a_panel_of_the_cache(dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    """6000 features: a panel holds the fewest tokens that it may, and there are many panels."""
    threads(2)
    wide = {"block": (16, 16), "blocks": 100, "free": 1, "tokens": 60, "dtype": dtype, "dy_layout": "contiguous"}

    check_kernels(cpu, random_case(3, rows=2, cols=375, out_features=30, in_features=5995, **wide))
    check_kernels(cpu, random_case(3, rows=375, cols=2, out_features=5995, in_features=30, **wide))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("sides", [(30, 16395), (16395, 30)])
def test_more_tokens_than_are_packed_at_once(
    sides: tuple[int, int], count: int, threads: Callable[[int], None]
) -> None:
    """Several panels are packed at a time, and that several times."""
    threads(count)
    out_features, in_features = sides
    size = {"rows": -(-out_features // 16), "cols": -(-in_features // 16), "blocks": 300, "free": 1, "tokens": 500}
    case = random_case(3, block=(16, 16), out_features=out_features, in_features=in_features, **size, **PLAIN)

    check_backward_is_dx_and_dvalues(case)
    check_dx(case, dx(case))
    check_dvalues(case, dvalues(case), torch.float32)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("blocks", [60, 3000, 40000])
def test_elements_of_any_density(blocks: int, count: int, threads: Callable[[int], None]) -> None:
    """Chunks of all features and of a few, strips of 128 rows and of less; whole panels and a part of one."""
    threads(count)
    for tokens in (16, 33, 130):
        layer = {"rows": 300, "cols": 310, "out_features": 300, "in_features": 310, "blocks": blocks, "tokens": tokens}
        check_kernels(cpu, random_case(4, block=(1, 1), dtype=torch.float32, **layer))


def test_elements_of_more_features_than_16_bits_count(threads: Callable[[int], None]) -> None:
    """And of more tokens than are packed at a time."""
    threads(2)
    sizes = {"block": (1, 1), "blocks": 3000, "free": 1, "tokens": 150, "dtype": torch.float32}
    many, few = 2**16 + 1000, 5

    check_kernels(cpu, random_case(5, rows=few, cols=many, out_features=few, in_features=many, **sizes))
    check_kernels(cpu, random_case(5, rows=many, cols=few, out_features=many, in_features=few, **sizes))


@pytest.mark.parametrize(("rows", "cols"), [(1100, 4200), (4200, 1100)])
def test_elements_of_a_panel_that_leaves_the_cache(rows: int, cols: int, threads: Callable[[int], None]) -> None:
    """Strips of 512 rows, and of 256 for two threads, with the same result."""
    sizes = {"block": (1, 1), "blocks": 6000, "free": 1, "tokens": 70, "dtype": torch.float32}
    case = random_case(6, rows=rows, cols=cols, out_features=rows, in_features=cols, **sizes)
    results = []
    for count in (1, 2):
        threads(count)
        check_kernels(cpu, case)
        results.append((fwd(case), dx(case), dvalues(case)))
    assert all(map(torch.equal, *results))


def test_elements_of_several_pieces(threads: Callable[[int], None]) -> None:
    """Entries that leave the cache are arranged a piece at a time, and anew for the next tokens that are packed."""
    sizes = {"block": (1, 1), "blocks": 300_000, "free": 1, "tokens": 270, "dtype": torch.float32}
    case = random_case(7, rows=26, cols=16500, out_features=26, in_features=16500, **sizes)
    results = []
    for count in (1, 2):
        threads(count)
        check_kernels(cpu, case)
        check_backward_is_dx_and_dvalues(case)
        results.append((fwd(case), dx(case), dvalues(case)))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("tokens", [40, 700])
def test_both_gradients_of_elements_share_panels_of_dy(tokens: int, threads: Callable[[int], None]) -> None:
    sizes = {"block": (1, 1), "blocks": 4000, "free": 1, "tokens": tokens, "dtype": torch.float32}
    for out_features, in_features in ((300, 90), (90, 300)):  # and where dy is the narrower one, each packs for itself
        layer = {"rows": out_features, "cols": in_features, "out_features": out_features, "in_features": in_features}
        case = random_case(8, **layer, **sizes)
        for count in (1, 2):
            threads(count)
            check_backward_is_dx_and_dvalues(case)
            check_kernels(cpu, case)


@pytest.mark.parametrize("dy_layout", DY_LAYOUTS)
@pytest.mark.parametrize("x_layout", X_LAYOUTS)
def test_any_strides(x_layout: str, dy_layout: str) -> None:
    for dtype in DTYPES:
        layouts = {"x_layout": x_layout, "dy_layout": dy_layout, "dtype": dtype}
        check_kernels(cpu, small_case(**layouts))
        check_kernels(cpu, small_case(out_features=80, in_features=128, tokens=40, **layouts))
        check_kernels(cpu, with_block((1, 1), tokens=40, **layouts))


@pytest.mark.parametrize("block", SQUARES)
def test_a_full_layer_is_a_dense_one(block: tuple[int, int]) -> None:
    check_kernels(cpu, with_block(block, blocks=20, free=0))


def test_values_of_any_strides() -> None:
    case = small_case()

    check_kernels(cpu, replace(case, values=case.values.transpose(1, 2).contiguous().transpose(1, 2)))
