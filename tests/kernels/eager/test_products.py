"""The products of the eager kernels, of linear layers and of convolutions: by hand, by the oracle, and their order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from sparsekern.kernels import eager
from sparsekern.kernels.contract import ConvShape, LinearShape

from sparsekern.topology import Grid, Topology, build_index, conv_grid, mask_index
from tests.kernels.calls import NAN, AnyCase, Calls, ints, is_real
from tests.oracle import (
    DTYPES,
    DY_LAYOUTS,
    X_LAYOUTS,
    Case,
    check_dvalues,
    check_dx,
    check_y,
    random_case,
    with_slots_reordered,
)
from tests.oracle_conv2d import ConvCase, conv_case

calls = Calls(eager)
fwd, dx, dvalues, check = calls.fwd, calls.dx, calls.dvalues, calls.check

Small = Callable[..., AnyCase]


def small_layer(block: tuple[int, int] = (4, 4), **given: object) -> Case:
    """5 x 4 blocks, 9 of them stored, and 2 free slots; those of 4 x 4 stick out on both sides."""
    sizes = (18, 15) if block == (4, 4) else (5 * block[0], 4 * block[1])
    settings = {"rows": 5, "cols": 4, "out_features": sizes[0], "in_features": sizes[1], "blocks": 9, "free": 2}
    settings |= {"tokens": 7, "dtype": torch.float32, "bias": True}
    settings |= {"x_layout": "contiguous", "dy_layout": "contiguous"}
    return random_case(0, **{**settings, "block": block, **given})


def small_conv(**given: object) -> ConvCase:
    """3x3, 2 groups, 2 x (9 * 2) blocks of 4 x 4 with an edge in every tap and group, 11 stored, 2 free slots."""
    settings = {"kernel": (3, 3), "stride": (1, 1), "dilation": (1, 1), "padding": (1, 1, 1, 1), "groups": 2}
    settings |= {"group_out": 6, "group_in": 7, "height": 5, "width": 6, "images": 3, "blocks": 11, "free": 2}
    settings |= {"block": (4, 4), "dtype": torch.float32, "bias": True}
    return conv_case(0, **{**settings, **given})


both = pytest.mark.parametrize("small", [small_layer, small_conv])


def full(small: Small, **given: object) -> AnyCase:
    """Return a case with all blocks stored."""
    return small(blocks=20 if small is small_layer else 72, **given)


# By hand.


def test_a_layer_of_three_blocks_by_hand() -> None:
    """Blocks of 1 x 2 in a weight of 3 x 4; slot 1 is free, and the second row is empty.

    5 6 1 2
    . . . .
    . . 3 4
    """
    shape, index = LinearShape(4, 3), build_index(Topology(Grid(3, 4, (1, 2)), ints(0, -1, 2, 0), ints(1, -1, 1, 0)))
    values = torch.tensor([[[1.0, 2]], [[99, 99]], [[3, 4]], [[5, 6]]])
    x = torch.tensor([[1.0, 2, 3, 4], [1, 0, 0, 0]])
    dy = torch.tensor([[1.0, 10, 100], [2, 0, 0]])

    assert eager.linear.fwd(x, values, None, index, shape).tolist() == [[28, 0, 25], [5, 0, 0]]
    assert eager.linear.fwd(x, values, torch.tensor([0.5, 7, 0]), index, shape).tolist() == [[28.5, 7, 25], [5.5, 7, 0]]
    assert eager.linear.dx(dy, values, index, shape).tolist() == [[5, 6, 301, 402], [10, 12, 2, 4]]
    grad = eager.linear.dvalues(dy, x, index, (1, 2), shape, torch.float32)
    assert grad.tolist() == [[[3, 4]], [[0, 0]], [[300, 400]], [[3, 2]]]


def test_an_edge_block_by_hand() -> None:
    """One block of 2 x 2 in a weight of 1 x 1: three quarters of it are phantom."""
    shape, index = LinearShape(1, 1), build_index(Topology(Grid(1, 1, (2, 2)), ints(0), ints(0)))
    values, x, dy = torch.tensor([[[2.0, 0], [0, 0]]]), torch.tensor([[3.0], [5]]), torch.tensor([[1.0], [10]])

    assert eager.linear.fwd(x, values, torch.tensor([1.0]), index, shape).tolist() == [[7], [11]]
    assert eager.linear.dx(dy, values, index, shape).tolist() == [[2], [20]]
    assert eager.linear.dvalues(dy, x, index, (2, 2), shape, torch.float32).tolist() == [[[53, 0], [0, 0]]]


def test_a_row_of_three_taps_by_hand() -> None:
    """A kernel of 1 x 3 over 2 channels in blocks of 1 x 2: taps 0 and 2 are stored, slot 1 is free.

    1 2 | . . | 3 4

    Pixels (1 10), (2 20), (3 30); y is left . (1 2) + right . (3 4), and beyond the edge is zero.
    """
    shape = ConvShape(2, 1, (1, 3), padding=(0, 0, 1, 1))
    index = build_index(Topology(conv_grid(2, 1, (1, 3), (1, 2)), ints(0, -1, 0), ints(2, -1, 0)))
    values = torch.tensor([[[3.0, 4]], [[99, 99]], [[1, 2]]])
    x = torch.tensor([[[[1.0, 2, 3]], [[10, 20, 30]]]]).contiguous(memory_format=torch.channels_last)
    dy = torch.tensor([[[[1.0, 10, 100]]]])

    y = eager.conv2d.fwd(x, values, torch.tensor([0.5]), index, shape)
    dx = eager.conv2d.dx(dy, values, index, shape, (1, 3))
    dvalues = eager.conv2d.dvalues(dy, x, index, (1, 2), shape, torch.float32)

    assert y.tolist() == [[[[86.5, 150.5, 42.5]]]]  # 2*3+20*4, 1+20+9+120, 2+40
    assert dx.tolist() == [[[[10, 103, 30]], [[20, 204, 40]]]]  # from the right (1 2), from the left (3 4)
    assert dvalues.tolist() == [[[32, 320]], [[0, 0]], [[210, 2100]]]  # 2*1 + 3*10; 1*10 + 2*100


def test_a_stride_by_hand() -> None:
    """Every second pixel of five, kernel 1 x 1 of value 2: three outputs; the skipped pixels get no gradient."""
    shape = ConvShape(1, 1, (1, 1), stride=(1, 2))
    index = build_index(Topology(conv_grid(1, 1, (1, 1), (1, 1)), ints(0), ints(0)))
    values, x = torch.tensor([[[2.0]]]), torch.tensor([[[[1.0, 2, 3, 4, 5]]]])

    assert eager.conv2d.fwd(x, values, None, index, shape).tolist() == [[[[2, 6, 10]]]]
    dx = eager.conv2d.dx(torch.tensor([[[[1.0, 10, 100]]]]), values, index, shape, (1, 5))
    assert dx.tolist() == [[[[2, 0, 20, 0, 200]]]]


def test_groups_share_block_columns_but_not_channels() -> None:
    """Two groups of one channel, kernel 1 x 1: block (0, 0) multiplies channel 0, block (1, 0) channel 1."""
    shape = ConvShape(2, 2, (1, 1), groups=2)
    index = build_index(Topology(conv_grid(2, 2, (1, 1), (1, 1), groups=2), ints(0, 1), ints(0, 0)))
    values, x = torch.tensor([[[2.0]], [[3.0]]]), torch.tensor([[[[1.0]], [[10]]]])

    assert eager.conv2d.fwd(x, values, None, index, shape).flatten().tolist() == [2, 30]
    assert eager.conv2d.dx(x, values, index, shape, (1, 1)).flatten().tolist() == [2, 30]
    assert eager.conv2d.dvalues(x, x, index, (1, 1), shape, torch.float32).flatten().tolist() == [1, 100]


# Against the oracle.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [(1, 1), (4, 4), (16, 16), (3, 7), (64, 16)])
@pytest.mark.parametrize("draw", [partial(random_case, tokens=19), partial(conv_case, images=2)], ids=["", "conv2d"])
def test_all_blocks_and_dtypes(draw: Small, block: tuple[int, int], dtype: torch.dtype) -> None:
    check(draw(11, block=block, dtype=dtype))


@pytest.mark.parametrize("tokens", [0, 1, 63, 64, 65])
@pytest.mark.parametrize("block", [(1, 1), (4, 4)])
def test_any_number_of_tokens(block: tuple[int, int], tokens: int) -> None:
    check(random_case(12, block=block, tokens=tokens, dtype=torch.float32))


@pytest.mark.parametrize("images", [0, 1, 5])
def test_any_number_of_images(images: int) -> None:
    check(small_conv(images=images))


@pytest.mark.parametrize("dy_layout", DY_LAYOUTS)
@pytest.mark.parametrize("x_layout", X_LAYOUTS)
def test_any_strides(x_layout: str, dy_layout: str) -> None:
    check(small_layer(x_layout=x_layout, dy_layout=dy_layout))
    check(small_layer(x_layout=x_layout, dy_layout=dy_layout, out_features=20, in_features=16))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 3), (2, 1)])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (1, 3), (5, 3), (2, 2), (7, 7)])
def test_kernels_strides_and_groups(kernel: tuple[int, int], stride: tuple[int, int], groups: int) -> None:
    for dilation, padding in (((1, 1), (0, 0, 0, 0)), ((1, 1), (1, 1, 1, 1)), ((2, 2), (2, 3, 1, 0))):
        given = {"kernel": kernel, "stride": stride, "groups": groups, "dilation": dilation, "padding": padding}
        reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        check(small_conv(height=reach[0] + 4, width=reach[1] + 3, blocks=3, **given))


@pytest.mark.parametrize("seed", range(12))
def test_random_convolutions(seed: int) -> None:
    for case in range(20 * seed, 20 * seed + 20):
        check(conv_case(case))


def test_depthwise() -> None:
    check(small_conv(groups=9, group_in=1, group_out=1, blocks=60, block=(1, 1)))
    check(small_conv(groups=5, group_in=1, group_out=2, blocks=30, block=(4, 4)))


def test_an_image_smaller_than_the_kernel() -> None:
    check(small_conv(kernel=(7, 7), padding=(3, 3, 3, 3), height=2, width=1, blocks=70))
    check(small_conv(kernel=(3, 3), dilation=(4, 4), padding=(4, 4, 4, 4), height=1, width=2))


def test_pixels_that_no_window_sees_have_no_gradient() -> None:
    """Stride 3, kernel 1: two of three pixels; and a rest at the end that the last window does not reach."""
    check(small_conv(kernel=(1, 1), stride=(3, 3), padding=(0, 0, 0, 0), height=9, width=8, blocks=5))
    case = small_conv(kernel=(2, 2), stride=(4, 4), padding=(0, 0, 0, 0), height=9, width=9)
    check(case)
    assert not dx(case)[:, :, 6:].any()


@both
def test_a_full_weight_is_a_dense_one(small: Small) -> None:
    check(full(small, free=0))


@both
def test_nothing_but_free_slots_gives_the_bias(small: Small) -> None:
    case = small()
    case = replace(case, row=torch.full_like(case.row, -1), col=torch.full_like(case.col, -1))
    y = fwd(case)

    assert torch.equal(y, case.bias.view(-1, *(1 for _ in case.size)).expand_as(y))
    assert not dx(case).any()
    assert not dvalues(case).any()


@both
def test_a_bias_of_any_strides(small: Small) -> None:
    case = small()

    check_y(case, fwd(replace(case, bias=case.bias.repeat_interleave(2)[::2])))
    expanded = replace(case, bias=torch.tensor(3.0).expand_as(case.bias))
    check_y(expanded, fwd(expanded))


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_of_another_dtype_are_rounded_when_read(small: Small, dtype: torch.dtype) -> None:
    """As under autocast: float32 values, and inputs of the compute dtype."""
    case = small(dtype=dtype, values_dtype=torch.float32)

    y, grad = fwd(case), dx(case)

    assert y.dtype == grad.dtype == dtype
    check_y(case, y)
    check_dx(case, grad)
    check_dvalues(case, dvalues(case, torch.float32), torch.float32)


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dvalues_come_in_the_dtype_that_is_asked_for(x_dtype: torch.dtype, dtype: torch.dtype) -> None:
    case = small_layer(dtype=x_dtype, tokens=40)

    check_dvalues(case, dvalues(case, dtype), dtype)


def test_dvalues_of_half_precision_inputs_keep_the_precision_of_their_sums() -> None:
    """1 + 2**-13 is no float16 number; the sum of its two parts must not have been one on the way."""
    case = random_case(0, block=(1, 1), rows=1, cols=1, blocks=1, free=0, tokens=2, dtype=torch.float16)
    case = replace(case, x=torch.ones(2, 1).half(), dy=torch.tensor([[1.0], [2**-13]]).half())

    assert dvalues(case, torch.float32).item() == 1 + 2**-13


def test_sums_over_many_inputs_are_not_formed_in_half_precision() -> None:
    """4096 ones in float16: a float16 sum would stop at 2048."""
    index = build_index(Topology(Grid(1, 4096, (1, 16)), ints(*[0] * 256), ints(*range(256))))
    x, ones = torch.ones(1, 4096).half(), torch.ones(256, 1, 16).half()

    assert eager.linear.fwd(x, ones, None, index, LinearShape(4096, 1)).item() == 4096


# What must not leak.


@both
def test_a_nan_in_one_token_or_image_stays_there(small: Small) -> None:
    case = small()
    x, dy = case.x.clone(), case.dy.clone()
    x[1] = dy[2] = NAN
    broken = replace(case, x=x, dy=dy)
    number = torch.arange(len(x))

    assert torch.equal(fwd(broken)[number != 1], fwd(case)[number != 1])
    assert torch.equal(dx(broken)[number != 2], dx(case)[number != 2])
    assert fwd(broken)[1].isnan().any()
    assert dx(broken)[2].isnan().any()


def test_a_nan_in_x_reaches_only_the_rows_that_read_it() -> None:
    """Input 0 is read by block row 0 alone, input 2 by block row 1."""
    shape, index = LinearShape(4, 4), build_index(Topology(Grid(4, 4, (2, 2)), ints(0, 1), ints(0, 1)))
    values, x = torch.ones(2, 2, 2), torch.tensor([[NAN, 1, 1, 1]])

    assert eager.linear.fwd(x, values, None, index, shape).isnan().tolist() == [[True, True, False, False]]
    assert eager.linear.dx(x, values, index, shape).isnan().tolist() == [[True, True, False, False]]


@both
@pytest.mark.parametrize("block", [(1, 1), (4, 4)])
def test_a_nan_in_a_free_slot_and_numbers_in_the_phantom_part_reach_nothing(
    small: Small, block: tuple[int, int]
) -> None:
    """The contract asks that the phantom part be finite; layers keep it at zero."""
    case = small(block=block) if block == (1, 1) else full(small)
    values = case.values.clone()
    values[~is_real(case)] = 1e30
    values[case.row < 0] = NAN
    broken = replace(case, values=values)

    assert torch.equal(fwd(broken), fwd(case))
    assert torch.equal(dx(broken), dx(case))


@both
@pytest.mark.parametrize("poisoned", [("dy",), ("x",), ("dy", "x")], ids=str)
@pytest.mark.parametrize("number", [NAN, float("inf")])
def test_dvalues_of_phantom_elements_and_free_slots_are_zero_whatever_dy_and_x_hold(
    small: Small, poisoned: tuple[str, ...], number: float
) -> None:
    case = full(small)
    case = replace(case, **{name: torch.full_like(getattr(case, name), number) for name in poisoned})

    grad = dvalues(case)

    assert not grad[~is_real(case)].any()
    middle = 8 if case.size else 0  # block column: of the middle tap
    assert grad[(case.row == 0) & (case.col == middle)].isfinite().logical_not().all()


def test_a_nan_in_dy_reaches_only_the_gradients_of_its_row() -> None:
    case = full(small_layer)
    dy = case.dy.clone()
    dy[3, 5] = NAN  # the second row of block row 1

    grad, clean = dvalues(replace(case, dy=dy)), dvalues(case)

    assert grad[(case.row == 1) & (case.col < 3), 1].isnan().all()
    assert torch.equal(grad[case.row != 1], clean[case.row != 1])
    assert torch.equal(grad[case.row == 1][:, [0, 2, 3]], clean[case.row == 1][:, [0, 2, 3]])


@both
def test_the_weight_and_the_inputs_are_not_written_to(small: Small) -> None:
    case = small()
    before = [t.clone() for t in (case.x, case.values, case.dy, case.row, case.col)]

    check(case)

    for tensor, copy in zip((case.x, case.values, case.dy, case.row, case.col), before, strict=True):
        assert torch.equal(tensor, copy)


# Order, and masks over slots.


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("block", [(1, 1), (4, 4), (16, 32)])
def test_two_calls_agree_to_the_bit(small: Small, block: tuple[int, int], dtype: torch.dtype) -> None:
    case = small(block=block, dtype=dtype, blocks=2)

    for kernel in (fwd, dx, dvalues):
        assert torch.equal(kernel(case), kernel(case))


@both
@pytest.mark.parametrize("block", [(1, 1), (4, 4)])
def test_the_order_of_the_slots_does_not_matter(
    small: Small, block: tuple[int, int], generator: torch.Generator
) -> None:
    """Not even to the last bit: sums run in the order of the index, not of the slots."""
    case = small(block=block)
    order = torch.randperm(len(case.row), generator=generator)
    shuffled = with_slots_reordered(case, order)

    check(shuffled)
    assert torch.equal(fwd(shuffled), fwd(case))
    assert torch.equal(dx(shuffled), dx(case))
    assert torch.equal(dvalues(shuffled), dvalues(case)[order])


@both
@pytest.mark.parametrize("block", [(1, 1), (4, 4)])
def test_a_masked_index_leaves_blocks_out(small: Small, block: tuple[int, int]) -> None:
    case = small(block=block)
    keep = torch.arange(len(case.row)) % 3 > 0
    index = mask_index(case.index, keep, block)
    kept = replace(case, row=torch.where(keep, case.row, -1).int(), col=torch.where(keep, case.col, -1).int())

    check_y(kept, fwd(case, index))
    check_dx(kept, dx(case, index))
    check_dvalues(kept, dvalues(case, torch.float32, index), torch.float32)
