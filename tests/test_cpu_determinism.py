"""The same bits for any number of threads and panels, any order of slots, and for both gradients at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from sparsekern.kernels import cpu

from tests.kernels.cpu.linear_calls import (
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
from tests.oracle import (
    DY_LAYOUTS,
    X_LAYOUTS,
    check_dvalues,
    check_dx,
    check_kernels,
    random_case,
    with_slots_reordered,
)

pytestmark = pytest.mark.usefixtures("instructions", "poisoned_memory")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [(1, 1), (16, 16), (32, 64), (128, 128)])
def test_one_two_and_three_threads_and_repeated_calls_agree_to_the_bit(
    block: tuple[int, int], dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    for tokens in (3, 12, 17, 300):
        case = large_case(block, dtype=dtype, tokens=tokens)
        for kernel in (fwd, dx, dvalues):
            threads(1)
            expected = kernel(case)
            for count in (1, 2, 3, 2):
                threads(count)
                assert torch.equal(kernel(case), expected), f"{kernel.__name__}, {tokens} tokens, {count} threads"


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("block", [*SQUARES, (128, 16), (16, 64)])
def test_both_gradients_at_once_are_those_of_one_after_the_other(
    block: tuple[int, int], count: int, threads: Callable[[int], None]
) -> None:
    threads(count)
    for dtype in DTYPES:
        for tokens in (1, 17, 300):
            check_backward_is_dx_and_dvalues(large_case(block, dtype=dtype, tokens=tokens))


@pytest.mark.parametrize("dy_layout", DY_LAYOUTS)
def test_both_gradients_at_once_of_any_strides(dy_layout: str) -> None:
    for x_layout in X_LAYOUTS:
        check_backward_is_dx_and_dvalues(small_case(tokens=40, x_layout=x_layout, dy_layout=dy_layout))


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


@pytest.mark.parametrize("block", [(1, 1), (16, 32)])
def test_the_order_of_the_slots_does_not_matter(block: tuple[int, int], generator: torch.Generator) -> None:
    """Not even to the last bit: sums run in the order of the index, not of the slots."""
    for tokens in (3, 40):
        case = with_block(block, tokens=tokens)
        order = torch.randperm(11, generator=generator)
        shuffled = with_slots_reordered(case, order)

        check_kernels(cpu, shuffled)
        assert torch.equal(fwd(shuffled), fwd(case))
        assert torch.equal(dx(shuffled), dx(case))
        assert torch.equal(dvalues(shuffled), dvalues(case)[order])
