"""The native linear kernels against the oracle, on every instruction set that the machine has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from sparsekern.kernels import cpu
from torch import Tensor

from sparsekern.topology import Grid, Topology, build_index, mask_index
from tests.oracle import (
    DY_LAYOUTS,
    X_LAYOUTS,
    Case,
    check_dvalues,
    check_dx,
    check_kernels,
    check_y,
    random_case,
    with_slots_reordered,
)

pytestmark = pytest.mark.usefixtures("instructions")

NAN = float("nan")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SQUARES = ((1, 1), (16, 16), (32, 32), (64, 64), (128, 128))
RECTANGLES = ((16, 32), (32, 16), (64, 16), (16, 128), (128, 32), (64, 128))
PLAIN = {"dtype": torch.float32, "x_layout": "contiguous", "dy_layout": "contiguous"}
TOKENS = (0, 1, 2, 8, 9, 15, 16, 17, 100, 300)


def ints(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def fwd(case: Case) -> Tensor:
    return cpu.fwd(case.x, case.values, case.bias, case.index, case.grid.out_features)


def dx(case: Case) -> Tensor:
    return cpu.dx(case.dy, case.values, case.index, case.grid.in_features)


def dvalues(case: Case, dtype: torch.dtype | None = None) -> Tensor:
    return cpu.dvalues(case.dy, case.x, case.index, case.grid.block, dtype or case.values.dtype)


def backward(case: Case) -> tuple[Tensor, Tensor]:
    return cpu.backward(case.dy, case.x, case.values, case.index)


def check_backward_is_dx_and_dvalues(case: Case) -> None:
    """To the bit, and the same in a call that finds the scratch of another one."""
    expected = dx(case), dvalues(case)
    for _ in range(2):
        found = backward(case)
        assert [t.dtype for t in found] == [case.dy.dtype, case.values.dtype]
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def small_case(**given: object) -> Case:
    """5 x 4 blocks of 16 x 32 with an edge on both sides, 9 of them stored, and 2 free slots."""
    settings = {"rows": 5, "cols": 4, "out_features": 70, "in_features": 125, "blocks": 9, "free": 2, "tokens": 7}
    settings |= {"block": (16, 32), "dtype": torch.float32, "bias": True}
    settings |= {"x_layout": "contiguous", "dy_layout": "contiguous"}
    return random_case(0, **{**settings, **given})


def large_case(block: tuple[int, int], **given: object) -> Case:
    """Enough work for several threads, panels of tokens and groups of block rows, with an edge on both sides."""
    out_features, in_features = (97, 105) if block == (1, 1) else (299, 307)
    rows, cols = -(-out_features // block[0]), -(-in_features // block[1])
    settings = {"rows": rows, "cols": cols, "out_features": out_features, "in_features": in_features}
    settings |= {"blocks": max(1, rows * cols // 2), "free": 3, "dtype": torch.float32, "tokens": 300}
    settings |= {"bias": True, "x_layout": "contiguous", "dy_layout": "contiguous"}
    return random_case(1, block=block, **{**settings, **given})


def with_block(block: tuple[int, int], **given: object) -> Case:
    return small_case(block=block, out_features=5 * block[0], in_features=4 * block[1], **given)


# Against the oracle.


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


@pytest.mark.parametrize("tokens", [1, 7, 40])
@pytest.mark.parametrize("block", [(1, 1), (16, 32)])
def test_a_layer_of_nothing_but_free_slots_gives_the_bias(block: tuple[int, int], tokens: int) -> None:
    case = with_block(block, tokens=tokens)
    case = replace(case, row=torch.full_like(case.row, -1), col=torch.full_like(case.col, -1))

    assert case.bias is not None
    assert torch.equal(fwd(case), case.bias.expand(tokens, -1))
    assert not dx(case).any()
    assert not dvalues(case).any()
    assert not backward(case)[0].any() and not backward(case)[1].any()


@pytest.mark.parametrize("block", [(1, 1), (16, 16)])
def test_a_layer_of_no_slots(block: tuple[int, int]) -> None:
    grid = Grid(3 * block[0], 2 * block[1], block)
    index = build_index(Topology(grid, ints(), ints()))
    x, dy, values = torch.ones(5, grid.in_features), torch.ones(5, grid.out_features), torch.zeros(0, *block)

    assert not cpu.fwd(x, values, None, index, grid.out_features).any()
    assert not cpu.dx(dy, values, index, grid.in_features).any()
    assert cpu.dvalues(dy, x, index, block, torch.float32).shape == (0, *block)
    assert not cpu.backward(dy, x, values, index)[0].any()
    assert cpu.backward(dy, x, values, index)[1].shape == (0, *block)


def test_a_bias_of_any_strides() -> None:
    case = small_case()
    assert case.bias is not None

    check_y(case, fwd(replace(case, bias=case.bias.repeat_interleave(2)[::2])))
    expanded = replace(case, bias=torch.tensor(3.0).expand(70))
    check_y(expanded, fwd(expanded))


def test_values_of_any_strides() -> None:
    case = small_case()

    check_kernels(cpu, replace(case, values=case.values.transpose(1, 2).contiguous().transpose(1, 2)))


@pytest.mark.parametrize("block", [(1, 1), (16, 32)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_of_another_dtype_are_rounded_when_read(dtype: torch.dtype, block: tuple[int, int]) -> None:
    """As under autocast: float32 values, and inputs of the compute dtype."""
    case = with_block(block, dtype=dtype, values_dtype=torch.float32, tokens=40)

    y, grad = fwd(case), dx(case)

    assert y.dtype == grad.dtype == dtype
    check_y(case, y)
    check_dx(case, grad)
    check_backward_is_dx_and_dvalues(case)


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_dvalues_come_in_the_dtype_that_is_asked_for(x_dtype: torch.dtype, dtype: torch.dtype) -> None:
    for block in ((1, 1), (16, 32)):
        case = with_block(block, dtype=x_dtype, tokens=40)

        check_dvalues(case, dvalues(case, dtype), dtype)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_and_device_change_nothing(default: torch.dtype) -> None:
    for block in ((1, 1), (16, 32)):
        case = with_block(block, tokens=40)
        index = case.index
        expected = dvalues(case), fwd(case), dx(case), dx(case), dvalues(case)
        torch.set_default_dtype(default)
        try:
            with torch.device("meta"):
                found = (
                    cpu.dvalues(case.dy, case.x, index, block, torch.float32),
                    cpu.fwd(case.x, case.values, case.bias, index, case.grid.out_features),
                    cpu.dx(case.dy, case.values, index, case.grid.in_features),
                    *cpu.backward(case.dy, case.x, case.values, index),
                )
                empty = cpu.dvalues(case.dy[:0], case.x[:0], index, block, torch.float32)
        finally:
            torch.set_default_dtype(torch.float32)

        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert (empty.dtype, empty.device.type) == (torch.float32, "cpu")


def negated(x: Tensor) -> Tensor:
    """The same numbers as a view of memory that holds them with the other sign."""
    view = torch.complex(torch.zeros(()), -x).conj().imag
    assert view.is_neg() and torch.equal(view, x)
    return view


@pytest.mark.parametrize("block", [(1, 1), (16, 32)])
def test_negated_views_keep_their_sign(block: tuple[int, int]) -> None:
    case = with_block(block, tokens=40)
    assert case.bias is not None
    views = {"x": negated(case.x), "dy": negated(case.dy), "bias": negated(case.bias), "values": negated(case.values)}
    same = replace(case, **views)

    assert torch.equal(fwd(same), fwd(case))
    assert torch.equal(dx(same), dx(case))
    assert torch.equal(dvalues(same), dvalues(case))
    assert torch.equal(backward(same)[0], dx(case)) and torch.equal(backward(same)[1], dvalues(case))


# What must not leak.


@pytest.mark.parametrize("tokens", [7, 40])
@pytest.mark.parametrize("block", [(1, 1), (16, 32)])
def test_a_nan_in_one_token_stays_in_that_token(block: tuple[int, int], tokens: int) -> None:
    case = with_block(block, blocks=20, tokens=tokens)
    x, dy = case.x.clone(), case.dy.clone()
    x[2, :] = dy[4, :] = NAN
    broken = replace(case, x=x, dy=dy)

    assert torch.equal(fwd(broken).isnan().any(1).nonzero().flatten(), torch.tensor([2]))
    assert torch.equal(dx(broken).isnan().any(1).nonzero().flatten(), torch.tensor([4]))
    assert torch.equal(fwd(broken)[3:], fwd(case)[3:])
    assert torch.equal(dx(broken)[:4], dx(case)[:4])
    assert torch.equal(backward(broken)[0].isnan(), dx(broken).isnan())


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("side", [1, 16])
def test_a_nan_in_x_reaches_only_the_rows_that_read_it(side: int, tokens: int) -> None:
    """Block column 0 is read by block row 0 alone, block column 1 by block row 1."""
    index = build_index(Topology(Grid(2 * side, 2 * side, (side, side)), ints(0, 1), ints(0, 1)))
    values, x = torch.ones(2, side, side), torch.ones(tokens, 2 * side)
    x[:, 0] = NAN
    reached = torch.arange(2 * side) < side

    assert torch.equal(cpu.fwd(x, values, None, index, 2 * side).isnan(), reached.expand(tokens, -1))
    assert torch.equal(cpu.dx(x, values, index, 2 * side).isnan(), reached.expand(tokens, -1))


@pytest.mark.parametrize("tokens", [7, 40])
@pytest.mark.parametrize("block", [(1, 1), (16, 32)])
def test_a_nan_in_a_free_slot_reaches_nothing(block: tuple[int, int], tokens: int) -> None:
    case = with_block(block, tokens=tokens)
    values = case.values.clone()
    values[case.row < 0] = NAN
    broken = replace(case, values=values)

    assert torch.equal(fwd(broken), fwd(case))
    assert torch.equal(dx(broken), dx(case))


@pytest.mark.parametrize("tokens", [7, 40])
def test_what_the_phantom_part_holds_changes_nothing(tokens: int) -> None:
    """The contract asks that it be finite; layers keep it at zero."""
    case = small_case(blocks=20, tokens=tokens)
    values = case.values.clone()
    values[case.row == 4, 6:, :] = 1e30  # 70 = 4 * 16 + 6
    values[case.col == 3, :, 29:] = -1e30  # 125 = 3 * 32 + 29
    broken = replace(case, values=values)

    assert torch.equal(fwd(broken), fwd(case))
    assert torch.equal(dx(broken), dx(case))


@pytest.mark.parametrize("poisoned", ["dy", "x", "both"])
@pytest.mark.parametrize("number", [NAN, float("inf")])
@pytest.mark.parametrize("count", [1, 3])
def test_dvalues_of_phantom_elements_and_free_slots_are_zero_whatever_dy_and_x_hold(
    poisoned: str, number: float, count: int, threads: Callable[[int], None]
) -> None:
    threads(count)
    case = small_case(blocks=20, tokens=300)
    if poisoned in ("dy", "both"):
        case = replace(case, dy=torch.full_like(case.dy, number))
    if poisoned in ("x", "both"):
        case = replace(case, x=torch.full_like(case.x, number))

    for grad in (dvalues(case), backward(case)[1]):
        assert not grad[case.row < 0].any()
        assert not grad[case.row == 4, 6:, :].any()
        assert not grad[case.col == 3, :, 29:].any()
        assert grad[(case.row == 0) & (case.col == 0)].isfinite().logical_not().all()


# Order.


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


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("block", [(1, 1), (16, 32)])
def test_a_masked_index_leaves_blocks_out(block: tuple[int, int], tokens: int) -> None:
    case = with_block(block, tokens=tokens)
    keep = torch.arange(11) % 3 > 0
    index = mask_index(case.index, keep, block)
    kept = replace(case, row=torch.where(keep, case.row, -1).int(), col=torch.where(keep, case.col, -1).int())

    check_y(kept, cpu.fwd(case.x, case.values, case.bias, index, case.grid.out_features))
    check_dx(kept, cpu.dx(case.dy, case.values, index, case.grid.in_features))
    check_dvalues(kept, cpu.dvalues(case.dy, case.x, index, block, torch.float32), torch.float32)
