"""The gradient of a convolution's weight is the sum of those of two parts of the images, for any number of threads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from sparsekern.kernels import cpu
from torch import Tensor

from tests.oracle_conv2d import ConvCase, check_conv, conv_case

pytestmark = pytest.mark.usefixtures("instructions", "poisoned_memory")


def images(count: int, blocks: int = 6, **given: object) -> ConvCase:
    """Of 11 x 13 pixels, in two groups, by blocks of 16 x 32 with an edge on both sides."""
    sizes = {"group_out": 23, "group_in": 39, "height": 11, "width": 13, "images": count, "blocks": blocks, "free": 1}
    shape = {"kernel": (3, 3), "stride": (1, 1), "dilation": (1, 1), "padding": (1, 1, 1, 1), "groups": 2}
    return conv_case(0, **{"block": (16, 32), "dtype": torch.float32, "bias": True, **sizes, **shape, **given})


def dvalues(case: ConvCase, first: int = 0, last: int | None = None) -> Tensor:
    dy, x = case.dy[first:last], case.x[first:last]
    return cpu.conv2d.dvalues(dy, x, case.index, case.grid.block, case.shape, torch.float32)


def test_few_blocks_are_summed_by_parts_and_many_are_not() -> None:
    """3 images have no halves, so that what they give is the sum of nothing else."""
    few, elements, many = images(6), images(6, blocks=100, block=(1, 1)), images(6, blocks=36)
    for case in (few, elements):
        assert torch.equal(dvalues(case), dvalues(case, 0, 3) + dvalues(case, 3))
    assert not torch.equal(dvalues(many), dvalues(many, 0, 3) + dvalues(many, 3))


@pytest.mark.parametrize(
    "given",
    [{}, {"dtype": torch.float16}, {"dtype": torch.bfloat16}, {"stride": (2, 2)}, {"block": (1, 1), "blocks": 1500}],
)
@pytest.mark.parametrize("count", [2, 3, 8, 17])
def test_any_number_of_images_and_threads(count: int, given: dict[str, object], threads: Callable[[int], None]) -> None:
    case = images(count, **given)
    check_conv(cpu, case)
    threads(1)
    dx = cpu.conv2d.dx(case.dy, case.values, case.index, case.shape, case.size)
    expected = dvalues(case)
    for number in (1, 2, 3, 4):
        threads(number)
        found = cpu.conv2d.backward(case.dy, case.x, case.values, case.index, case.shape)
        assert torch.equal(dvalues(case), expected), f"{number} threads"
        assert torch.equal(found[0], dx), f"{number} threads"
        assert torch.equal(found[1].float(), expected.to(found[1].dtype).float()), f"{number} threads"


def test_an_image_that_leaves_the_caches_is_written_past_them_by_each_thread(threads: Callable[[int], None]) -> None:
    case = images(2, height=300, width=290, group_in=64)
    dx = cpu.conv2d.dx(case.dy, case.values, case.index, case.shape, case.size)
    for number in (1, 2):
        threads(number)
        found = cpu.conv2d.backward(case.dy, case.x, case.values, case.index, case.shape)
        assert torch.equal(found[0], dx) and torch.equal(found[1], dvalues(case))
