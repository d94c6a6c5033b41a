"""The native convolution kernels against the oracle, on every instruction set that the machine has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from sparsekern.kernels import cpu
from sparsekern.kernels.contract import ConvShape
from torch import Tensor

from sparsekern.topology import balanced, build_index, conv_grid, generator_for
from tests.kernels.cpu.calls import DTYPES, assert_same, backward, dvalues, dx, results, small_conv
from tests.kernels.cpu.calls import conv_with_block as with_block
from tests.oracle import check_kernels
from tests.oracle_conv2d import ConvCase, conv_case

pytestmark = pytest.mark.usefixtures("instructions", "poisoned_memory")

BLOCKS = ((1, 1), (16, 16), (32, 32), (64, 64), (128, 128), (16, 32), (32, 16), (64, 16), (16, 128))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", BLOCKS)
def test_all_blocks_and_dtypes(block: tuple[int, int], dtype: torch.dtype) -> None:
    check_kernels(cpu, with_block(block, dtype=dtype))


@pytest.mark.parametrize("seed", range(8))
def test_random_convolutions(seed: int) -> None:
    for case in range(8 * seed, 8 * seed + 8):
        check_kernels(cpu, conv_case(case, block=BLOCKS[case % 9], dtype=torch.float32))


@pytest.mark.parametrize("block", [(1, 1), (16, 32)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 3), (1, 3), (2, 1)])
@pytest.mark.parametrize("dilation", [(1, 1), (2, 2), (3, 1)])
@pytest.mark.parametrize("size", [(7, 8), (8, 29), (9, 40)])  # short rows, and some that are packed once
def test_strides_and_dilations(
    block: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int], size: tuple[int, int]
) -> None:
    for padding in ((0, 0, 0, 0), (2, 1, 0, 3)):
        given = {"stride": stride, "dilation": dilation, "height": size[0], "width": size[1], "padding": padding}
        check_kernels(cpu, with_block(block, images=2, **given))


@pytest.mark.parametrize("block", [(16, 16), (32, 64), (128, 32)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 3)])
@pytest.mark.parametrize("size", [(7, 8), (5, 40), (9, 19)])
def test_bfloat16_of_any_stride_and_size(
    block: tuple[int, int], stride: tuple[int, int], size: tuple[int, int]
) -> None:
    """Where it has instructions of its own their tiles read 16 or 32 pixels at a time, and blocks in slices of 32."""
    given = {"stride": stride, "height": size[0], "width": size[1], "padding": (2, 1, 0, 3), "dilation": (2, 1)}
    for images, blocks in ((1, 3), (6, 30)):
        check_kernels(cpu, with_block(block, images=images, blocks=blocks, dtype=torch.bfloat16, **given))


@pytest.mark.parametrize("block", [(1, 1), (16, 16)])
@pytest.mark.parametrize("kernel", [(1, 1), (1, 3), (5, 1), (2, 2), (7, 7)])
def test_kernels(block: tuple[int, int], kernel: tuple[int, int]) -> None:
    for stride in ((1, 1), (2, 2), (3, 3)):  # strides of 2 and 3 leave pixels that no window of 1x1 sees
        for width in (8, 33):
            check_kernels(cpu, with_block(block, kernel=kernel, stride=stride, height=9, width=width, blocks=2))


@pytest.mark.parametrize("block", [(1, 1), (16, 16)])
def test_groups_of_few_channels(block: tuple[int, int]) -> None:
    for group_out, group_in in ((1, 1), (2, 1), (1, 3), (16, 16)):
        check_kernels(cpu, small_conv(block=block, groups=5, group_out=group_out, group_in=group_in, blocks=7))


@pytest.mark.parametrize("block", [(1, 1), (32, 32)])
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (4, 4), (1, 50)])
@pytest.mark.parametrize("images", [0, 1, 2, 5, 33])
def test_sizes_and_numbers_of_images(images: int, size: tuple[int, int], block: tuple[int, int]) -> None:
    check_kernels(cpu, with_block(block, images=images, height=size[0], width=size[1], groups=1, blocks=13))


@pytest.mark.parametrize("block", [(1, 1), (16, 32)])
def test_images_that_are_packed_in_bands(block: tuple[int, int]) -> None:
    """The larger image does not fit into half of any L2 cache up to 8 MiB, with its channels."""
    for stride in ((1, 1), (2, 2)):
        shape = {"height": 150, "width": 130, "images": 1, "group_out": 20, "group_in": 64, "groups": 1}
        check_kernels(cpu, small_conv(block=block, stride=stride, blocks=9, **shape))


def test_empty_rows_and_columns() -> None:
    """One block of 4 x 18; and none at all, with free slots."""
    one = small_conv(blocks=1, free=3)
    check_kernels(cpu, one)
    check_kernels(cpu, replace(one, row=torch.full_like(one.row, -1), col=torch.full_like(one.col, -1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [(1, 1), (16, 32)])
@pytest.mark.parametrize("width", [6, 25])
def test_an_image_gets_the_same_bits_in_any_batch(block: tuple[int, int], width: int, dtype: torch.dtype) -> None:
    case = with_block(block, images=9, width=width, dtype=dtype)
    y, grad, _ = results(case)
    for n in (0, 4, 8):
        one = replace(case, x=case.x[n : n + 1], dy=case.dy[n : n + 1])
        assert_same(results(one)[:2], (y[n : n + 1], grad[n : n + 1]))


def test_no_scratch_is_left_behind() -> None:
    case = small_conv()
    expected = results(case)
    cpu.release_scratch()
    results(case)
    held = cpu.scratch_bytes()
    for _ in range(20):
        assert_same(results(case), expected)
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
        lambda: cpu.products.fwd(x, values, None, index, shape),
        lambda: cpu.products.dx(dy, values, index, shape, (1, 1)),
        lambda: cpu.products.dvalues(dy, x, index, block, shape, torch.float32),
        lambda: cpu.products.backward(dy, x, values, index, shape),
    ):
        with pytest.raises(MemoryError, match="cannot plan a convolution of such a padding, stride or dilation"):
            call()


# The gradient of the weight is the sum of those of two parts of the images, for any number of threads.


def images(count: int, blocks: int = 6, **given: Any) -> ConvCase:
    """Images of 11 x 13 pixels."""
    return small_conv(**{"height": 11, "width": 13, "images": count, "blocks": blocks, "free": 1, **given})


def of_some(case: ConvCase, first: int, last: int | None = None) -> Tensor:
    return dvalues(replace(case, dy=case.dy[first:last], x=case.x[first:last]), torch.float32)


def test_few_blocks_are_summed_by_parts_and_many_are_not() -> None:
    """3 images have no halves, so that what they give is the sum of nothing else."""
    few, elements, many = images(6), images(6, blocks=100, block=(1, 1)), images(6, blocks=36)
    for case in (few, elements):
        assert torch.equal(of_some(case, 0), of_some(case, 0, 3) + of_some(case, 3))
    assert not torch.equal(of_some(many, 0), of_some(many, 0, 3) + of_some(many, 3))


@pytest.mark.parametrize(
    "given",
    [{}, {"dtype": torch.float16}, {"dtype": torch.bfloat16}, {"stride": (2, 2)}, {"block": (1, 1), "blocks": 1500}],
)
@pytest.mark.parametrize("count", [2, 3, 8, 17])
def test_any_number_of_images_and_threads(count: int, given: dict[str, Any], threads: Callable[[int], None]) -> None:
    case = images(count, **given)
    check_kernels(cpu, case)
    threads(1)
    grad, expected = dx(case), dvalues(case, torch.float32)
    for number in (1, 2, 3, 4):
        threads(number)
        assert torch.equal(dvalues(case, torch.float32), expected), f"{number} threads"
        assert_same(backward(case), (grad, expected.to(case.values.dtype)))


def test_an_image_that_leaves_the_caches_is_written_past_them_by_each_thread(threads: Callable[[int], None]) -> None:
    case = images(2, height=300, width=290, group_in=64)
    expected = dx(case), dvalues(case)
    for number in (1, 2):
        threads(number)
        assert_same(backward(case), expected)
