from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sparsekern.kernels import eager
from sparsekern.kernels.contract import ConvShape, Index
from sparsekern.kernels.eager import chunks
from torch import Tensor

from sparsekern.topology import Topology, build_index, conv_grid, mask_index
from tests.memory import allocations
from tests.oracle import DTYPES, check_dvalues, check_dx, check_kernels, check_y
from tests.oracle_conv2d import ConvCase, conv_case, with_slots_reordered

NAN = float("nan")


def ints(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def fwd(case: ConvCase) -> Tensor:
    return eager.conv2d.fwd(case.x, case.values, case.bias, case.index, case.shape)


def dx(case: ConvCase) -> Tensor:
    return eager.conv2d.dx(case.dy, case.values, case.index, case.shape, case.size)


def dvalues(case: ConvCase, dtype: torch.dtype | None = None) -> Tensor:
    return eager.conv2d.dvalues(case.dy, case.x, case.index, case.grid.block, case.shape, dtype or case.values.dtype)


def small_case(**given: object) -> ConvCase:
    """3x3, 2 groups, 2 x (9 * 2) blocks of 4 x 4 with an edge in every tap and group, 11 stored, 2 free slots."""
    settings = {"kernel": (3, 3), "stride": (1, 1), "dilation": (1, 1), "padding": (1, 1, 1, 1), "groups": 2}
    settings |= {"group_out": 6, "group_in": 7, "height": 5, "width": 6, "images": 3, "blocks": 11, "free": 2}
    settings |= {"block": (4, 4), "dtype": torch.float32, "bias": True}
    return conv_case(0, **{**settings, **given})


# By hand.


def one_by_three() -> tuple[ConvShape, Index, Tensor]:
    """A kernel of 1 x 3 over 2 channels in blocks of 1 x 2: taps 0 and 2 are stored, slot 1 is free.

    1 2 | . . | 3 4
    """
    shape = ConvShape(2, 1, (1, 3), padding=(0, 0, 1, 1))
    index = build_index(Topology(conv_grid(2, 1, (1, 3), (1, 2)), ints(0, -1, 0), ints(2, -1, 0)))
    return shape, index, torch.tensor([[[3.0, 4]], [[99, 99]], [[1, 2]]])


def test_a_row_of_three_taps_by_hand() -> None:
    """Pixels (1 10), (2 20), (3 30); y is left . (1 2) + right . (3 4), and beyond the edge is zero."""
    shape, index, values = one_by_three()
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
def test_all_blocks_and_dtypes(block: tuple[int, int], dtype: torch.dtype) -> None:
    check_kernels(eager, conv_case(11, block=block, dtype=dtype, images=2))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 3), (2, 1)])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (1, 3), (5, 3), (2, 2), (7, 7)])
def test_kernels_strides_and_groups(kernel: tuple[int, int], stride: tuple[int, int], groups: int) -> None:
    for dilation, padding in (((1, 1), (0, 0, 0, 0)), ((1, 1), (1, 1, 1, 1)), ((2, 2), (2, 3, 1, 0))):
        given = {"kernel": kernel, "stride": stride, "groups": groups, "dilation": dilation, "padding": padding}
        reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        check_kernels(eager, small_case(height=reach[0] + 4, width=reach[1] + 3, blocks=3, **given))


@pytest.mark.parametrize("seed", range(12))
def test_random_convolutions(seed: int) -> None:
    for case in range(20 * seed, 20 * seed + 20):
        check_kernels(eager, conv_case(case))


def test_depthwise() -> None:
    check_kernels(eager, small_case(groups=9, group_in=1, group_out=1, blocks=60, block=(1, 1)))
    check_kernels(eager, small_case(groups=5, group_in=1, group_out=2, blocks=30, block=(4, 4)))


@pytest.mark.parametrize("images", [0, 1, 5])
def test_any_number_of_images(images: int) -> None:
    check_kernels(eager, small_case(images=images))


def test_an_image_smaller_than_the_kernel() -> None:
    check_kernels(eager, small_case(kernel=(7, 7), padding=(3, 3, 3, 3), height=2, width=1, blocks=70))
    check_kernels(eager, small_case(kernel=(3, 3), dilation=(4, 4), padding=(4, 4, 4, 4), height=1, width=2))


def test_pixels_that_no_window_sees_have_no_gradient() -> None:
    """Stride 3, kernel 1: two of three pixels; and a rest at the end that the last window does not reach."""
    check_kernels(eager, small_case(kernel=(1, 1), stride=(3, 3), padding=(0, 0, 0, 0), height=9, width=8, blocks=5))
    case = small_case(kernel=(2, 2), stride=(4, 4), padding=(0, 0, 0, 0), height=9, width=9)
    check_kernels(eager, case)
    assert not dx(case)[:, :, 6:].any()


def test_a_full_convolution_is_a_dense_one() -> None:
    check_kernels(eager, small_case(blocks=72, free=0))


def test_nothing_but_free_slots_gives_the_bias() -> None:
    case = small_case()
    case = replace(case, row=torch.full_like(case.row, -1), col=torch.full_like(case.col, -1))

    assert torch.equal(fwd(case), case.bias.view(-1, 1, 1).expand(3, -1, 5, 6))
    assert not dx(case).any()
    assert not dvalues(case).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_of_another_dtype_are_rounded_when_read(dtype: torch.dtype) -> None:
    case = small_case(dtype=dtype, values_dtype=torch.float32)

    y, grad = fwd(case), dx(case)

    assert y.dtype == grad.dtype == dtype
    check_y(case, y)
    check_dx(case, grad)
    check_dvalues(case, dvalues(case, torch.float32), torch.float32)


# What must not leak.


def test_a_nan_in_one_image_stays_in_that_image() -> None:
    case = small_case()
    x, dy = case.x.clone(), case.dy.clone()
    x[1] = dy[2] = NAN
    broken = replace(case, x=x, dy=dy)

    assert torch.equal(fwd(broken)[[0, 2]], fwd(case)[[0, 2]])
    assert torch.equal(dx(broken)[[0, 1]], dx(case)[[0, 1]])
    assert fwd(broken)[1].isnan().any()
    assert dx(broken)[2].isnan().any()


def test_a_nan_in_a_free_slot_and_numbers_in_the_phantom_part_reach_nothing() -> None:
    case = small_case(blocks=72)
    values = case.values.clone()
    values[case.row < 0] = NAN
    values[case.row % 2 == 1, 2:, :] = 1e30  # 6 = 4 + 2 channels in each group
    values[case.col % 2 == 1, :, 3:] = -1e30  # 7 = 4 + 3 channels in each tap
    broken = replace(case, values=values)

    assert torch.equal(fwd(broken), fwd(case))
    assert torch.equal(dx(broken), dx(case))


@pytest.mark.parametrize("poisoned", ["dy", "x"])
def test_dvalues_of_phantom_elements_and_free_slots_are_zero_whatever_dy_and_x_hold(poisoned: str) -> None:
    case = small_case(blocks=72)
    case = replace(case, **{poisoned: torch.full_like(getattr(case, poisoned), NAN)})

    grad = dvalues(case)

    assert not grad[case.row < 0].any()
    assert not grad[case.row % 2 == 1, 2:, :].any()
    assert not grad[case.col % 2 == 1, :, 3:].any()
    assert grad[(case.row == 0) & (case.col == 8)].isnan().all()  # the middle tap


def test_the_weight_and_the_input_are_not_written_to() -> None:
    case = small_case()
    before = [t.clone() for t in (case.x, case.values, case.dy, case.row, case.col)]

    check_kernels(eager, case)

    for tensor, copy in zip((case.x, case.values, case.dy, case.row, case.col), before, strict=True):
        assert torch.equal(tensor, copy)


# Order.


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_two_calls_agree_to_the_bit(dtype: torch.dtype) -> None:
    case = small_case(dtype=dtype)

    for kernel in (fwd, dx, dvalues):
        assert torch.equal(kernel(case), kernel(case))


def test_the_order_of_the_slots_does_not_matter(generator: torch.Generator) -> None:
    case = small_case()
    order = torch.randperm(13, generator=generator)
    shuffled = with_slots_reordered(case, order)

    assert torch.equal(fwd(shuffled), fwd(case))
    assert torch.equal(dx(shuffled), dx(case))
    assert torch.equal(dvalues(shuffled), dvalues(case)[order])


@pytest.mark.parametrize("block", [(1, 1), (4, 4)])
def test_a_masked_index_leaves_blocks_out(block: tuple[int, int]) -> None:
    case = small_case(block=block)
    keep = torch.arange(13) % 3 > 0
    index = mask_index(case.index, keep, block)
    kept = replace(case, row=torch.where(keep, case.row, -1).int(), col=torch.where(keep, case.col, -1).int())

    check_y(kept, eager.conv2d.fwd(case.x, case.values, case.bias, index, case.shape))
    check_dx(kept, eager.conv2d.dx(case.dy, case.values, index, case.shape, case.size))
    grad = eager.conv2d.dvalues(case.dy, case.x, index, block, case.shape, torch.float32)
    check_dvalues(kept, grad, torch.float32)


# Declared scratch.


@pytest.mark.parametrize("scratch", [1, 3000, 20_000, 200_000])
def test_the_result_does_not_depend_on_the_scratch(scratch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From one row of one image and one block at a time to everything at once."""
    monkeypatch.setattr(chunks, "SCRATCH_BYTES", scratch)
    for seed in range(20):
        check_kernels(eager, conv_case(seed))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    "given",
    [
        {"group_out": 64, "group_in": 64},
        {"group_out": 100, "group_in": 20},  # the sums are most of what a panel holds ...
        {"group_out": 20, "group_in": 100},  # ... or the filled up input
        {"group_out": 64, "group_in": 64, "stride": (2, 2)},
        {"group_out": 64, "group_in": 16, "dilation": (2, 2), "padding": (2, 2, 2, 2)},
        {"group_out": 16, "group_in": 16, "groups": 4},
        {"group_out": 48, "group_in": 16, "kernel": (5, 5), "padding": (2, 2, 2, 2), "blocks": 20},
        {"group_out": 16, "group_in": 16, "block": (1, 1), "blocks": 300},
    ],
    ids=str,
)
def test_the_scratch_stays_within_what_is_declared(
    given: dict[str, object], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several panels of rows and several chunks of blocks, in a scratch made small to keep the test so."""
    monkeypatch.setattr(chunks, "SCRATCH_BYTES", 2**20)
    settings = {"block": (16, 16), "groups": 1, "height": 32, "width": 32, "images": 2, "blocks": 9, "free": 0}
    case = small_case(**{**settings, "dtype": dtype, **given})

    for kernel in (fwd, dx, dvalues):
        beside = allocations(lambda kernel=kernel: kernel(case)).peak - kernel(case).nbytes
        assert beside <= chunks.SCRATCH_BYTES, f"{kernel.__name__}: {beside}"
