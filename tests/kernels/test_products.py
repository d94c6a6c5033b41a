"""What the products of the eager and of the native kernels must do, of layers and of convolutions.

The native ones on every instruction set here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from sparsekern.kernels import cpu
from sparsekern.kernels.contract import LinearShape

from sparsekern.topology import Grid, Topology, build_index, mask_index
from tests.kernels.calls import NAN, AnyCase, Calls, full, ints, is_real, small_layer
from tests.oracle import DTYPES, check_dvalues, check_dx, check_y, with_slots_reordered

Block = tuple[int, int]
Make = Callable[..., AnyCase]


def sized(make: Make, tokens: int) -> dict[str, int]:
    """Return the option for a layer of few or many tokens, or for a convolution of some images."""
    return {"tokens": tokens} if make is small_layer else {"images": 1 + tokens % 6}


few_and_many = pytest.mark.parametrize("tokens", [7, 40])


# Free slots, dtypes, strides.


def test_a_full_weight_is_a_dense_one(calls: Calls, make: Make, block: Block) -> None:
    calls.check(full(make, block, free=0))


@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_nothing_but_free_slots_gives_the_bias(calls: Calls, make: Make, block: Block, tokens: int) -> None:
    case = make(block, **sized(make, tokens))
    case = replace(case, row=torch.full_like(case.row, -1), col=torch.full_like(case.col, -1))
    y, *gradients = calls.results(case)

    assert torch.equal(y, case.bias.view(-1, *(1 for _ in case.size)).expand_as(y))
    assert not any(found.any() for found in (*gradients, *calls.backward(case)))


def test_no_slots(calls: Calls, make: Make, block: Block) -> None:
    case = make(block)
    case = replace(case, row=ints(), col=ints(), values=torch.zeros(0, *block), bias=None)
    y, grad, blocks = calls.results(case)
    found = calls.backward(case)

    assert not y.any() and not grad.any() and not found[0].any()
    assert blocks.shape == found[1].shape == (0, *block)


def test_a_bias_of_any_strides(calls: Calls, make: Make, block: Block) -> None:
    case = make(block)

    check_y(case, calls.fwd(replace(case, bias=case.bias.repeat_interleave(2)[::2])))
    expanded = replace(case, bias=torch.tensor(3.0).expand_as(case.bias))
    check_y(expanded, calls.fwd(expanded))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_of_another_dtype_are_rounded_when_read(
    calls: Calls, make: Make, block: Block, dtype: torch.dtype
) -> None:
    """As under autocast: float32 values, and inputs of the compute dtype."""
    case = make(block, dtype=dtype, values_dtype=torch.float32, **sized(make, 40))
    y, grad, blocks = calls.results(case)

    assert y.dtype == grad.dtype == dtype
    check_y(case, y)
    check_dx(case, grad)
    check_dvalues(case, blocks, torch.float32)
    assert all(map(torch.equal, calls.backward(case), (grad, blocks)))


@pytest.mark.parametrize("x_dtype", DTYPES)
def test_dvalues_come_in_the_dtype_that_is_asked_for(
    calls: Calls, make: Make, block: Block, x_dtype: torch.dtype
) -> None:
    if calls.backend is cpu and x_dtype is torch.float64:
        pytest.skip("the native kernels take no float64")
    case = make(block, dtype=x_dtype, **sized(make, 40))
    for dtype in DTYPES:
        check_dvalues(case, calls.dvalues(case, dtype), dtype)


# What must not leak: NaN and infinity, phantom elements and free slots.


@few_and_many
def test_a_nan_in_one_token_or_image_stays_there(calls: Calls, make: Make, block: Block, tokens: int) -> None:
    case = full(make, block, **sized(make, tokens) if make is small_layer else {})
    x, dy = case.x.clone(), case.dy.clone()
    x[1] = dy[2] = NAN
    broken = replace(case, x=x, dy=dy)
    number, (y, grad, _) = torch.arange(len(x)), calls.results(broken)

    assert y[1].isnan().any() and torch.equal(y[number != 1], calls.fwd(case)[number != 1])
    assert grad[2].isnan().any() and torch.equal(grad[number != 2], calls.dx(case)[number != 2])
    assert torch.equal(calls.backward(broken)[0].isnan(), grad.isnan())


@pytest.mark.parametrize("tokens", [1, 40])
def test_a_nan_in_x_reaches_only_the_rows_that_read_it(calls: Calls, block: Block, tokens: int) -> None:
    """Block column 0 is read by block row 0 alone, block column 1 by block row 1."""
    bo, bi = block
    index = build_index(Topology(Grid(2 * bo, 2 * bi, block), ints(0, 1), ints(0, 1)))
    values, shape, kernels = torch.ones(2, *block), LinearShape(2 * bi, 2 * bo), calls.backend.kernels
    x, dy = torch.ones(tokens, 2 * bi), torch.ones(tokens, 2 * bo)
    x[:, 0] = dy[:, 0] = NAN

    y, dx = kernels(shape).fwd(x, values, None, index, shape), kernels(shape).dx(dy, values, index, shape)
    assert torch.equal(y.isnan(), (torch.arange(2 * bo) < bo).expand_as(y))
    assert torch.equal(dx.isnan(), (torch.arange(2 * bi) < bi).expand_as(dx))


@few_and_many
def test_a_nan_in_a_free_slot_and_numbers_in_the_phantom_part_reach_nothing(
    calls: Calls, make: Make, block: Block, tokens: int
) -> None:
    """The contract asks that the phantom part be finite; layers keep it at zero."""
    case = full(make, block, **sized(make, tokens))
    values = case.values.clone()
    values[~is_real(case)] = 1e30
    values[case.row < 0] = NAN
    broken = replace(case, values=values)

    assert torch.equal(calls.fwd(broken), calls.fwd(case))
    assert torch.equal(calls.dx(broken), calls.dx(case))


@pytest.mark.parametrize("poisoned", [("dy",), ("x",), ("dy", "x")], ids=str)
@pytest.mark.parametrize("number", [NAN, float("inf")])
def test_dvalues_of_phantom_elements_and_free_slots_are_zero_whatever_dy_and_x_hold(
    calls: Calls,
    make: Make,
    block: Block,
    poisoned: tuple[str, ...],
    number: float,
    threads: Callable[[int], None],
) -> None:
    case = full(make, block, **({"tokens": 300} if make is small_layer else {}))
    case = replace(case, **{name: torch.full_like(getattr(case, name), number) for name in poisoned})
    middle = case.grid.taps // 2 * case.grid.tap_cols  # block column: of the middle tap

    for count in (1, 3):
        threads(count)
        for grad in (calls.dvalues(case), calls.backward(case)[1]):
            assert not grad[~is_real(case)].any()
            assert grad[(case.row == 0) & (case.col == middle)].isfinite().logical_not().all()


def test_the_weight_and_the_inputs_are_not_written_to(calls: Calls, make: Make, block: Block) -> None:
    case = make(block)
    before = [t.clone() for t in (case.x, case.values, case.dy, case.row, case.col)]

    calls.check(case)

    for tensor, copy in zip((case.x, case.values, case.dy, case.row, case.col), before, strict=True):
        assert torch.equal(tensor, copy)


# Order, and masks over slots.


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_two_calls_agree_to_the_bit(calls: Calls, make: Make, block: Block, dtype: torch.dtype) -> None:
    case = make(block, dtype=dtype)

    assert all(map(torch.equal, calls.results(case), calls.results(case)))


@pytest.mark.parametrize("tokens", [3, 40])
def test_the_order_of_the_slots_does_not_matter(
    calls: Calls, make: Make, block: Block, tokens: int, generator: torch.Generator
) -> None:
    """Not even to the last bit: sums run in the order of the index, not of the slots."""
    case = make(block, **sized(make, tokens))
    order = torch.randperm(len(case.row), generator=generator)
    shuffled = with_slots_reordered(case, order)
    y, grad, blocks = calls.results(case)

    calls.check(shuffled)
    assert all(map(torch.equal, calls.results(shuffled), (y, grad, blocks[order])))


@pytest.mark.parametrize("tokens", [3, 40])
def test_a_masked_index_leaves_blocks_out(calls: Calls, make: Make, block: Block, tokens: int) -> None:
    case = make(block, **sized(make, tokens))
    keep = torch.arange(len(case.row)) % 3 > 0
    index = mask_index(case.index, keep, block)
    kept = replace(case, row=torch.where(keep, case.row, -1).int(), col=torch.where(keep, case.col, -1).int())

    check_y(kept, calls.fwd(case, index))
    check_dx(kept, calls.dx(case, index))
    check_dvalues(kept, calls.dvalues(case, torch.float32, index), torch.float32)
