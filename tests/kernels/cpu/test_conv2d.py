"""The native convolution kernels against the oracle, on every instruction set that the machine has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from sparsekern.kernels import cpu
from sparsekern.kernels.contract import ConvShape
from torch import Tensor

from sparsekern.topology import Topology, balanced, build_index, conv_grid, generator_for
from tests.oracle_conv2d import (
    ConvCase,
    channels_last,
    check_conv,
    check_conv_dvalues,
    check_conv_dx,
    check_conv_y,
    conv_case,
    with_slots_reordered,
)

pytestmark = pytest.mark.usefixtures("instructions")

NAN = float("nan")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCKS = ((1, 1), (16, 16), (32, 32), (64, 64), (128, 128), (16, 32), (32, 16), (64, 16), (16, 128))


def ints(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def results(case: ConvCase) -> tuple[Tensor, Tensor, Tensor]:
    index, shape, block = case.index, case.shape, case.grid.block
    return (
        cpu.conv2d.fwd(case.x, case.values, case.bias, index, shape),
        cpu.conv2d.dx(case.dy, case.values, index, shape, case.size),
        cpu.conv2d.dvalues(case.dy, case.x, index, block, shape, torch.float32),
    )


def assert_same(case: ConvCase, expected: tuple[Tensor, ...]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(results(case), expected, strict=True))


def small_case(**given: object) -> ConvCase:
    """3x3, 2 groups, 2 x (9 * 2) blocks of 16 x 32 with an edge in every tap and group, 20 stored, 2 free slots."""
    settings = {"kernel": (3, 3), "stride": (1, 1), "dilation": (1, 1), "padding": (1, 1, 1, 1), "groups": 2}
    settings |= {"group_out": 23, "group_in": 39, "height": 5, "width": 6, "images": 3, "blocks": 20, "free": 2}
    settings |= {"block": (16, 32), "dtype": torch.float32, "bias": True}
    return conv_case(0, **{**settings, **given})


def with_block(block: tuple[int, int], **given: object) -> ConvCase:
    """2 x (9 * 2) blocks and their edges, of any size."""
    return small_case(block=block, group_out=block[0] + 3, group_in=block[1] + 5, **given)


# Against the oracle.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", BLOCKS)
def test_all_blocks_and_dtypes(block: tuple[int, int], dtype: torch.dtype) -> None:
    check_conv(cpu, with_block(block, dtype=dtype))


@pytest.mark.parametrize("seed", range(8))
def test_random_convolutions(seed: int) -> None:
    for case in range(8 * seed, 8 * seed + 8):
        check_conv(cpu, conv_case(case, block=BLOCKS[case % 9], dtype=torch.float32))


@pytest.mark.parametrize("block", [(1, 1), (16, 32)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 3), (1, 3), (2, 1)])
@pytest.mark.parametrize("dilation", [(1, 1), (2, 2), (3, 1)])
@pytest.mark.parametrize("size", [(7, 8), (8, 29), (9, 40)])  # short rows, and some that are packed once
def test_strides_and_dilations(
    block: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int], size: tuple[int, int]
) -> None:
    for padding in ((0, 0, 0, 0), (2, 1, 0, 3)):
        given = {"stride": stride, "dilation": dilation, "height": size[0], "width": size[1], "padding": padding}
        check_conv(cpu, with_block(block, images=2, **given))


@pytest.mark.parametrize("block", [(16, 16), (32, 64), (128, 32)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 3)])
@pytest.mark.parametrize("size", [(7, 8), (5, 40), (9, 19)])
def test_bfloat16_of_any_stride_and_size(
    block: tuple[int, int], stride: tuple[int, int], size: tuple[int, int]
) -> None:
    """Where it has instructions of its own their tiles read 16 or 32 pixels at a time, and blocks in pieces of 32."""
    given = {"stride": stride, "height": size[0], "width": size[1], "padding": (2, 1, 0, 3), "dilation": (2, 1)}
    for images, blocks in ((1, 3), (6, 30)):
        check_conv(cpu, with_block(block, images=images, blocks=blocks, dtype=torch.bfloat16, **given))


@pytest.mark.parametrize("block", [(1, 1), (16, 16)])
@pytest.mark.parametrize("kernel", [(1, 1), (1, 3), (5, 1), (2, 2), (7, 7)])
def test_kernels(block: tuple[int, int], kernel: tuple[int, int]) -> None:
    for stride in ((1, 1), (2, 2), (3, 3)):  # strides of 2 and 3 leave pixels that no window of 1x1 sees
        for width in (8, 33):
            check_conv(cpu, with_block(block, kernel=kernel, stride=stride, height=9, width=width, blocks=2))


@pytest.mark.parametrize("block", [(1, 1), (16, 16)])
def test_groups_of_few_channels(block: tuple[int, int]) -> None:
    for group_out, group_in in ((1, 1), (2, 1), (1, 3), (16, 16)):
        check_conv(cpu, small_case(block=block, groups=5, group_out=group_out, group_in=group_in, blocks=7))


@pytest.mark.parametrize("block", [(1, 1), (32, 32)])
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (4, 4), (1, 50)])
@pytest.mark.parametrize("images", [0, 1, 2, 5, 33])
def test_sizes_and_numbers_of_images(images: int, size: tuple[int, int], block: tuple[int, int]) -> None:
    check_conv(cpu, with_block(block, images=images, height=size[0], width=size[1], groups=1, blocks=13))


@pytest.mark.parametrize("block", [(1, 1), (16, 32)])
def test_images_that_are_packed_in_strips(block: tuple[int, int]) -> None:
    """The larger image does not fit into half of any L2 cache up to 8 MiB, with its channels."""
    for stride in ((1, 1), (2, 2)):
        shape = {
            "height": 150,
            "width": 130,
            "images": 1,
            "group_out": 20,
            "group_in": 64,
            "groups": 1,
            "kernel": (3, 3),
        }
        check_conv(cpu, small_case(block=block, stride=stride, blocks=9, **shape))


def test_empty_rows_and_columns() -> None:
    """One block of 4 x 18; and none at all, with free slots."""
    one = small_case(blocks=1, free=3)
    check_conv(cpu, one)
    none = replace(one, row=torch.full_like(one.row, -1), col=torch.full_like(one.col, -1))
    check_conv(cpu, none)
    assert one.bias is not None
    y, dx, dvalues = results(none)
    assert torch.equal(y, one.bias.view(-1, 1, 1).expand_as(y))
    assert not dx.any() and not dvalues.any()


def test_no_slots() -> None:
    shape = ConvShape(16, 16, (3, 3), padding=(1, 1, 1, 1))
    index = build_index(Topology(conv_grid(16, 16, (3, 3), (16, 16)), ints(), ints()))
    x, values = channels_last(torch.ones(2, 4, 4, 16)), torch.ones(0, 16, 16)

    assert not cpu.conv2d.fwd(x, values, None, index, shape).any()
    assert not cpu.conv2d.dx(x, values, index, shape, (4, 4)).any()
    assert cpu.conv2d.dvalues(x, x, index, (16, 16), shape, torch.float32).shape == (0, 16, 16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_of_another_dtype_are_rounded_when_read(dtype: torch.dtype) -> None:
    case = small_case(dtype=dtype, values_dtype=torch.float32)
    y, dx, _ = results(case)

    assert y.dtype == dx.dtype == dtype
    check_conv_y(case, y)
    check_conv_dx(case, dx)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_dvalues_come_in_the_dtype_that_is_asked_for(dtype: torch.dtype) -> None:
    case = small_case()
    found = cpu.conv2d.dvalues(case.dy, case.x, case.index, case.grid.block, case.shape, dtype)

    check_conv_dvalues(case, found, dtype)


def negated(x: Tensor) -> Tensor:
    """The same numbers as a view of memory that holds them with the other sign."""
    return torch.complex(torch.zeros(()), -x).conj().imag


def test_negated_views_keep_their_sign() -> None:
    case = small_case()
    assert case.bias is not None
    views = {name: negated(getattr(case, name)) for name in ("values", "bias")}
    views |= {n: channels_last(negated(getattr(case, n).permute(0, 2, 3, 1).contiguous())) for n in ("x", "dy")}
    assert all(view.is_neg() for view in views.values())

    assert_same(replace(case, **views), results(case))


# What must not matter.


@pytest.mark.parametrize("block", [(1, 1), (16, 16), (32, 32)])
@pytest.mark.parametrize(
    "given",
    [{"images": 1}, {"images": 7}, {"images": 7, "stride": (2, 2)}, {"images": 7, "dtype": torch.bfloat16}],
)
@pytest.mark.parametrize("width", [4, 20])
def test_threads_do_not_change_a_bit(
    block: tuple[int, int], given: dict[str, object], width: int, threads: Callable[[int], None]
) -> None:
    case = with_block(block, height=16, width=width, blocks=36, groups=1, **given)
    expected = results(case)
    for count in (2, 3):
        threads(count)
        assert_same(case, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [(1, 1), (16, 32)])
@pytest.mark.parametrize("width", [6, 25])
def test_an_image_gets_the_same_bits_in_any_batch(block: tuple[int, int], width: int, dtype: torch.dtype) -> None:
    case = with_block(block, images=9, width=width, dtype=dtype)
    y, dx, _ = results(case)
    for n in (0, 4, 8):
        one = replace(case, x=case.x[n : n + 1], dy=case.dy[n : n + 1])
        assert torch.equal(results(one)[0], y[n : n + 1])
        assert torch.equal(results(one)[1], dx[n : n + 1])


@pytest.mark.parametrize("block", [(1, 1), (16, 32)])
def test_the_order_of_slots_changes_no_bit(block: tuple[int, int], generator: torch.Generator) -> None:
    case = with_block(block)
    order = torch.randperm(len(case.row), generator=generator)
    y, dx, dvalues = results(case)

    assert_same(with_slots_reordered(case, order), (y, dx, dvalues[order]))


# What must not leak.


@pytest.mark.parametrize("block", [(1, 1), (16, 32)])
@pytest.mark.parametrize("width", [6, 25])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_nan_stays_in_the_windows_that_see_it(
    block: tuple[int, int], width: int, stride: tuple[int, int], dtype: torch.dtype
) -> None:
    """In a corner: what follows it in memory is another row or image."""
    case = with_block(block, width=width, stride=stride, blocks=36 if block != (1, 1) else 300, dtype=dtype)
    y, dx, dvalues = results(case)
    x, dy = case.x.clone(memory_format=torch.channels_last), case.dy.clone(memory_format=torch.channels_last)
    x[1, :, 0, -1] = dy[1, :, 0, -1] = NAN
    with_x, with_dy = results(replace(case, x=x)), results(replace(case, dy=dy))

    def images(found: Tensor) -> list[int]:
        return found.isnan().any(3).any(2).any(1).nonzero().flatten().tolist()

    assert images(with_x[0]) == images(with_dy[1]) == [1]
    columns = with_x[0][1].isnan().any(0).nonzero()
    assert int(columns[:, 0].max()) <= 1 and int(columns[:, 1].min()) >= y.shape[3] - 2
    columns = with_dy[1][1].isnan().any(0).nonzero()
    assert int(columns[:, 0].max()) <= 1 and int(columns[:, 1].min()) >= dx.shape[3] - 4
    assert torch.equal(with_x[0][~with_x[0].isnan()], y[~with_x[0].isnan()])
    # A pixel in the top right corner is seen by no window through the lowest row of taps, nor through the left column.
    taps = case.col // case.shape.block_cols(block[1])
    unseen = (case.row >= 0) & ((taps // 3 == 2) if stride == (1, 1) else torch.zeros_like(taps, dtype=torch.bool))
    assert torch.equal(with_x[2][unseen], dvalues[unseen])


def test_phantom_channels_and_free_slots_are_zero() -> None:
    case = small_case()
    x = case.x.clone(memory_format=torch.channels_last)
    x[0, :, 2, 2] = NAN
    dvalues = results(replace(case, x=x))[2]

    assert not dvalues[case.row < 0].any()
    assert not dvalues[(case.row >= 0) & (case.row % 2 == 1), 7:].any()
    assert not dvalues[(case.row >= 0) & (case.col % 2 == 1), :, 7:].any()


def test_no_scratch_is_left_behind() -> None:
    case = small_case()
    expected = results(case)
    cpu.release_scratch()
    results(case)
    held = cpu.scratch_bytes()
    for _ in range(20):
        assert_same(case, expected)
    assert cpu.scratch_bytes() == held > 0
    cpu.release_scratch()
    assert cpu.scratch_bytes() == 0


EXTREMES = [
    ((2, 2), (1, 1), (10**8,) * 4, (2 * 10**8,) * 2, (1, 1)),
    ((2, 1), (1, 1), (10**9, 10**9, 0, 0), (2 * 10**9, 1), (1, 1)),
    ((1, 1), (2**40, 2**40), (2**40,) * 4, (1, 1), (3, 3)),
    ((3, 3), (2**31, 7), (2**33,) * 4, (2**33, 2**33), (1, 1)),
]


@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation", "out"), EXTREMES)
@pytest.mark.parametrize("block", [(1, 1), (16, 16)])
def test_a_convolution_that_nobody_has_is_refused(block, kernel, stride, padding, dilation, out):
    """Not a panel of a wrapped size: products of sizes that leave 64 bits, and offsets that leave 32, are noticed."""
    shape = ConvShape(600, 16, kernel, stride, padding, dilation)
    index = build_index(balanced(conv_grid(600, 16, kernel, block), 4, generator_for(0)))
    assert shape.output_size(1, 1) == out
    dy = torch.ones(1, *out, 16).permute(0, 3, 1, 2)
    x, values = torch.ones(1, 1, 1, 600).permute(0, 3, 1, 2), torch.ones(4, *block)
    for call in (
        lambda: cpu.conv2d.fwd(x, values, None, index, shape),
        lambda: cpu.conv2d.dx(dy, values, index, shape, (1, 1)),
        lambda: cpu.conv2d.dvalues(dy, x, index, block, shape, torch.float32),
        lambda: cpu.conv2d.backward(dy, x, values, index, shape),
    ):
        with pytest.raises(MemoryError, match="cannot plan a convolution of such a padding, stride or dilation"):
            call()
