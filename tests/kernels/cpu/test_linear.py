"""The native linear kernels against the oracle, on every instruction set that the machine has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from sparsekern.kernels import cpu
from sparsekern.kernels.contract import LinearShape
from torch import Tensor

from sparsekern.topology import Grid, Topology, build_index, mask_index
from tests.kernels.cpu.linear_calls import (
    DTYPES,
    SQUARES,
    backward,
    check_backward_is_dx_and_dvalues,
    dvalues,
    dx,
    fwd,
    ints,
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
    check_y,
    random_case,
)

pytestmark = pytest.mark.usefixtures("instructions")

RECTANGLES = ((16, 32), (32, 16), (64, 16), (16, 128), (128, 32), (64, 128))
TOKENS = (0, 1, 2, 8, 9, 15, 16, 17, 100, 300)


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

    assert not cpu.linear.fwd(x, values, None, index, LinearShape(x.shape[-1], grid.out_features)).any()
    assert not cpu.linear.dx(dy, values, index, LinearShape(grid.in_features, dy.shape[-1])).any()
    assert cpu.linear.dvalues(dy, x, index, block, LinearShape(x.shape[-1], dy.shape[-1]), torch.float32).shape == (
        0,
        *block,
    )
    assert not cpu.linear.backward(dy, x, values, index, LinearShape(x.shape[-1], dy.shape[-1]))[0].any()
    assert cpu.linear.backward(dy, x, values, index, LinearShape(x.shape[-1], dy.shape[-1]))[1].shape == (0, *block)


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
                    cpu.linear.dvalues(case.dy, case.x, index, block, case.geometry, torch.float32),
                    cpu.linear.fwd(case.x, case.values, case.bias, index, case.geometry),
                    cpu.linear.dx(case.dy, case.values, index, case.geometry),
                    *cpu.linear.backward(case.dy, case.x, case.values, index, case.geometry),
                )
                empty = cpu.linear.dvalues(case.dy[:0], case.x[:0], index, block, case.geometry, torch.float32)
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


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("block", [(1, 1), (16, 32)])
def test_a_masked_index_leaves_blocks_out(block: tuple[int, int], tokens: int) -> None:
    case = with_block(block, tokens=tokens)
    keep = torch.arange(11) % 3 > 0
    index = mask_index(case.index, keep, block)
    kept = replace(case, row=torch.where(keep, case.row, -1).int(), col=torch.where(keep, case.col, -1).int())

    check_y(kept, cpu.linear.fwd(case.x, case.values, case.bias, index, case.geometry))
    check_dx(kept, cpu.linear.dx(case.dy, case.values, index, case.geometry))
    check_dvalues(kept, cpu.linear.dvalues(case.dy, case.x, index, block, case.geometry, torch.float32), torch.float32)
