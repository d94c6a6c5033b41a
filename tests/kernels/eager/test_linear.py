from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sparsekern.kernels import eager
from sparsekern.kernels.contract import LinearShape
from torch import Tensor

from sparsekern.topology import Grid, Topology, build_index, mask_index
from tests.oracle import (
    DTYPES,
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

NAN = float("nan")


def ints(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def fwd(case: Case) -> Tensor:
    return eager.linear.fwd(case.x, case.values, case.bias, case.index, case.geometry)


def dx(case: Case) -> Tensor:
    return eager.linear.dx(case.dy, case.values, case.index, case.geometry)


def dvalues(case: Case, dtype: torch.dtype | None = None) -> Tensor:
    return eager.linear.dvalues(case.dy, case.x, case.index, case.grid.block, case.geometry, dtype or case.values.dtype)


def small_case(**given: object) -> Case:
    """5 x 4 blocks of 4 x 4 with an edge on both sides, 9 of them stored, and 2 free slots."""
    settings = {"rows": 5, "cols": 4, "out_features": 18, "in_features": 15, "blocks": 9, "free": 2, "tokens": 7}
    settings |= {"block": (4, 4), "dtype": torch.float32, "bias": True}
    settings |= {"x_layout": "contiguous", "dy_layout": "contiguous"}
    return random_case(0, **{**settings, **given})


# By hand.


def test_a_layer_of_three_blocks_by_hand() -> None:
    """Blocks of 1 x 2 in a weight of 3 x 4; slot 1 is free, and the second row is empty.

    5 6 1 2
    . . . .
    . . 3 4
    """
    grid = Grid(3, 4, (1, 2))
    index = build_index(Topology(grid, ints(0, -1, 2, 0), ints(1, -1, 1, 0)))
    values = torch.tensor([[[1.0, 2]], [[99, 99]], [[3, 4]], [[5, 6]]])
    x = torch.tensor([[1.0, 2, 3, 4], [1, 0, 0, 0]])
    dy = torch.tensor([[1.0, 10, 100], [2, 0, 0]])

    assert eager.linear.fwd(x, values, None, index, LinearShape(x.shape[-1], 3)).tolist() == [[28, 0, 25], [5, 0, 0]]
    assert eager.linear.fwd(x, values, torch.tensor([0.5, 7, 0]), index, LinearShape(x.shape[-1], 3)).tolist() == [
        [28.5, 7, 25],
        [5.5, 7, 0],
    ]
    assert eager.linear.dx(dy, values, index, LinearShape(4, dy.shape[-1])).tolist() == [
        [5, 6, 301, 402],
        [10, 12, 2, 4],
    ]
    assert eager.linear.dvalues(
        dy, x, index, (1, 2), LinearShape(x.shape[-1], dy.shape[-1]), torch.float32
    ).tolist() == [[[3, 4]], [[0, 0]], [[300, 400]], [[3, 2]]]


def test_an_edge_block_by_hand() -> None:
    """One block of 2 x 2 in a weight of 1 x 1: three quarters of it are phantom."""
    index = build_index(Topology(Grid(1, 1, (2, 2)), ints(0), ints(0)))
    values = torch.tensor([[[2.0, 0], [0, 0]]])
    x, dy = torch.tensor([[3.0], [5]]), torch.tensor([[1.0], [10]])

    assert eager.linear.fwd(x, values, torch.tensor([1.0]), index, LinearShape(x.shape[-1], 1)).tolist() == [[7], [11]]
    assert eager.linear.dx(dy, values, index, LinearShape(1, dy.shape[-1])).tolist() == [[2], [20]]
    assert eager.linear.dvalues(
        dy, x, index, (2, 2), LinearShape(x.shape[-1], dy.shape[-1]), torch.float32
    ).tolist() == [[[53, 0], [0, 0]]]


# Against the oracle.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [(1, 1), (4, 4), (16, 16), (3, 7), (64, 16)])
def test_all_blocks_and_dtypes(block: tuple[int, int], dtype: torch.dtype) -> None:
    check_kernels(eager, random_case(11, block=block, dtype=dtype, tokens=19))


@pytest.mark.parametrize("tokens", [0, 1, 63, 64, 65])
@pytest.mark.parametrize("block", [(1, 1), (4, 4)])
def test_any_number_of_tokens(block: tuple[int, int], tokens: int) -> None:
    check_kernels(eager, random_case(12, block=block, tokens=tokens, dtype=torch.float32))


@pytest.mark.parametrize("dy_layout", DY_LAYOUTS)
@pytest.mark.parametrize("x_layout", X_LAYOUTS)
def test_any_strides(x_layout: str, dy_layout: str) -> None:
    check_kernels(eager, small_case(x_layout=x_layout, dy_layout=dy_layout))
    check_kernels(eager, small_case(x_layout=x_layout, dy_layout=dy_layout, out_features=20, in_features=16))


def test_a_full_layer_is_a_dense_one() -> None:
    check_kernels(eager, small_case(blocks=20, free=0))


def test_a_layer_of_nothing_but_free_slots_gives_the_bias() -> None:
    case = small_case()
    case = replace(case, row=torch.full_like(case.row, -1), col=torch.full_like(case.col, -1))

    assert torch.equal(fwd(case), case.bias.expand(7, -1))
    assert not dx(case).any()
    assert not dvalues(case).any()


def test_a_bias_of_any_strides() -> None:
    case = small_case()

    check_y(case, fwd(replace(case, bias=case.bias.repeat_interleave(2)[::2])))
    expanded = replace(case, bias=torch.tensor(3.0).expand(18))
    check_y(expanded, fwd(expanded))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_of_another_dtype_are_rounded_when_read(dtype: torch.dtype) -> None:
    """As under autocast: float32 values, and inputs of the compute dtype."""
    case = small_case(dtype=dtype, values_dtype=torch.float32, tokens=40)

    y, grad = fwd(case), dx(case)

    assert y.dtype == grad.dtype == dtype
    check_y(case, y)
    check_dx(case, grad)


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dvalues_come_in_the_dtype_that_is_asked_for(x_dtype: torch.dtype, dtype: torch.dtype) -> None:
    case = small_case(dtype=x_dtype, tokens=40)

    check_dvalues(case, dvalues(case, dtype), dtype)


def test_dvalues_of_half_precision_inputs_keep_the_precision_of_their_sums() -> None:
    """1 + 2**-13 is no float16 number; the sum of its two parts must not have been one on the way."""
    case = random_case(0, block=(1, 1), rows=1, cols=1, blocks=1, free=0, tokens=2, dtype=torch.float16)
    case = replace(case, x=torch.ones(2, 1).half(), dy=torch.tensor([[1.0], [2**-13]]).half())

    assert dvalues(case, torch.float32).item() == 1 + 2**-13


def test_sums_over_many_inputs_are_not_formed_in_half_precision() -> None:
    """4096 ones in float16: a float16 sum would stop at 2048."""
    grid = Grid(1, 4096, (1, 16))
    topology = Topology(grid, torch.zeros(256, dtype=torch.int32), torch.arange(256, dtype=torch.int32))
    ones = torch.ones(256, 1, 16).half()

    assert (
        eager.linear.fwd(
            torch.ones(1, 4096).half(),
            ones,
            None,
            build_index(topology),
            LinearShape(torch.ones(1, 4096).half().shape[-1], 1),
        ).item()
        == 4096
    )


# What must not leak.


def test_a_nan_in_one_token_stays_in_that_token() -> None:
    case = small_case()
    x, dy = case.x.clone(), case.dy.clone()
    x[2, :] = dy[4, :] = NAN
    broken = replace(case, x=x, dy=dy)
    others = [0, 1, 3, 4, 5, 6], [0, 1, 2, 3, 5, 6]

    assert torch.equal(fwd(broken)[others[0]], fwd(case)[others[0]])
    assert torch.equal(dx(broken)[others[1]], dx(case)[others[1]])
    assert fwd(broken)[2].isnan().any()
    assert dx(broken)[4].isnan().any()


def test_a_nan_in_x_reaches_only_the_rows_that_read_it() -> None:
    """Input 0 is read by block row 0 alone, input 2 by block row 1."""
    index = build_index(Topology(Grid(4, 4, (2, 2)), ints(0, 1), ints(0, 1)))
    values, x = torch.ones(2, 2, 2), torch.tensor([[NAN, 1, 1, 1]])

    assert eager.linear.fwd(x, values, None, index, LinearShape(x.shape[-1], 4)).isnan().tolist() == [
        [True, True, False, False]
    ]
    assert eager.linear.dx(x, values, index, LinearShape(4, x.shape[-1])).isnan().tolist() == [
        [True, True, False, False]
    ]


@pytest.mark.parametrize("block", [(1, 1), (4, 4)])
def test_a_nan_in_a_free_slot_reaches_nothing(block: tuple[int, int]) -> None:
    case = small_case(block=block, out_features=5 * block[0], in_features=4 * block[1])
    values = case.values.clone()
    values[case.row < 0] = NAN
    broken = replace(case, values=values)

    assert torch.equal(fwd(broken), fwd(case))
    assert torch.equal(dx(broken), dx(case))


def test_what_the_phantom_part_holds_changes_nothing() -> None:
    """The contract asks that it be finite; layers keep it at zero."""
    case = small_case(blocks=20)
    values = case.values.clone()
    values[case.row == 4, 2:, :] = 1e30  # 18 = 4 * 4 + 2
    values[case.col == 3, :, 3:] = -1e30  # 15 = 3 * 4 + 3
    broken = replace(case, values=values)

    assert torch.equal(fwd(broken), fwd(case))
    assert torch.equal(dx(broken), dx(case))


@pytest.mark.parametrize("poisoned", ["dy", "x", "both"])
@pytest.mark.parametrize("number", [NAN, float("inf")])
def test_dvalues_of_phantom_elements_and_free_slots_are_zero_whatever_dy_and_x_hold(
    poisoned: str, number: float
) -> None:
    case = small_case(blocks=20)
    if poisoned in ("dy", "both"):
        case = replace(case, dy=torch.full_like(case.dy, number))
    if poisoned in ("x", "both"):
        case = replace(case, x=torch.full_like(case.x, number))

    grad = dvalues(case)

    assert not grad[case.row < 0].any()
    assert not grad[case.row == 4, 2:, :].any()
    assert not grad[case.col == 3, :, 3:].any()
    assert grad[(case.row == 0) & (case.col == 0)].isfinite().logical_not().all()


def test_a_nan_in_dy_reaches_only_the_gradients_of_its_row() -> None:
    case = small_case(blocks=20)
    dy = case.dy.clone()
    dy[3, 5] = NAN  # the second row of block row 1

    grad, clean = dvalues(replace(case, dy=dy)), dvalues(case)

    assert grad[(case.row == 1) & (case.col < 3), 1].isnan().all()
    assert torch.equal(grad[case.row != 1], clean[case.row != 1])
    assert torch.equal(grad[case.row == 1][:, [0, 2, 3]], clean[case.row == 1][:, [0, 2, 3]])


# Order.


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("block", [(1, 1), (4, 4), (16, 32)])
def test_two_calls_agree_to_the_bit(block: tuple[int, int], dtype: torch.dtype) -> None:
    case = random_case(5, block=block, tokens=33, dtype=dtype)

    for kernel in (fwd, dx, dvalues):
        assert torch.equal(kernel(case), kernel(case))


@pytest.mark.parametrize("block", [(1, 1), (4, 4)])
def test_the_order_of_the_slots_does_not_matter(block: tuple[int, int], generator: torch.Generator) -> None:
    """Not even to the last bit: sums run in the order of the index, not of the slots."""
    case = small_case(block=block, out_features=5 * block[0], in_features=4 * block[1])
    order = torch.randperm(11, generator=generator)
    shuffled = with_slots_reordered(case, order)

    check_kernels(eager, shuffled)
    assert torch.equal(fwd(shuffled), fwd(case))
    assert torch.equal(dx(shuffled), dx(case))
    assert torch.equal(dvalues(shuffled), dvalues(case)[order])


# Masks over slots.


@pytest.mark.parametrize("block", [(1, 1), (4, 4)])
def test_a_masked_index_leaves_blocks_out(block: tuple[int, int]) -> None:
    case = small_case(block=block, out_features=5 * block[0], in_features=4 * block[1])
    keep = torch.arange(11) % 3 > 0
    index = mask_index(case.index, keep, block)
    kept = replace(
        case, row=torch.where(keep, case.row, -1).int(), col=torch.where(keep, case.col, -1).int(), values=case.values
    )

    check_y(kept, eager.linear.fwd(case.x, case.values, case.bias, index, case.geometry))
    check_dx(kept, eager.linear.dx(case.dy, case.values, index, case.geometry))
    check_dvalues(
        kept, eager.linear.dvalues(case.dy, case.x, index, block, case.geometry, torch.float32), torch.float32
    )
