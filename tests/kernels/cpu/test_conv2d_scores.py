"""The native scores of a convolution against the oracle, on every instruction set that the machine has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from sparsekern.kernels import cpu
from sparsekern.kernels.cpu import scores
from torch import Tensor

from tests.kernels.cpu.test_scores import negated
from tests.memory import allocations
from tests.oracle_conv2d import ConvCase, channels_last, conv_case
from tests.oracle_conv2d_scores import all_conv_cells, check_conv_norms, check_conv_sketch
from tests.oracle_scores import signs

pytestmark = pytest.mark.usefixtures("instructions")


def check_scores(case: ConvCase) -> None:
    block, shape = case.grid.block, case.shape
    u, v = signs(3, case.grid.out_features, 0), signs(3, case.grid.in_features, 1)
    check_conv_norms(case, cpu.conv2d.all_block_norms(case.dy, case.x, block, shape))
    check_conv_norms(case, cpu.conv2d.block_norms(case.dy, case.x, *all_conv_cells(case), block, shape))
    check_conv_sketch(case, cpu.conv2d.sketch(case.dy, case.x, u, v, block, shape), u, v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [(1, 1), (16, 16), (32, 64)])
def test_scores_of_any_block_and_dtype(block: tuple[int, int], dtype: torch.dtype) -> None:
    for seed in range(3):
        check_scores(conv_case(seed, block=block, dtype=dtype))


@pytest.mark.parametrize("chunk", [1, 20_000])
def test_chunks_change_no_bit(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = conv_case(3, block=(16, 16), images=2, dtype=torch.float32)
    block, shape = case.grid.block, case.shape
    expected = cpu.conv2d.all_block_norms(case.dy, case.x, block, shape)
    monkeypatch.setattr(scores, "CHUNK_BYTES", chunk)

    assert torch.equal(cpu.conv2d.all_block_norms(case.dy, case.x, block, shape), expected)
    found = cpu.conv2d.block_norms(case.dy, case.x, *all_conv_cells(case), block, shape)
    assert torch.equal(found.view_as(expected), expected)


def test_blocks_are_chosen_in_any_order_and_more_than_once(generator: torch.Generator) -> None:
    case = conv_case(4, block=(16, 16), images=2, dtype=torch.float32)
    block, shape = case.grid.block, case.shape
    row, col = all_conv_cells(case)
    which = torch.randint(len(row), (20,), generator=generator)
    expected = cpu.conv2d.all_block_norms(case.dy, case.x, block, shape).flatten()[which]

    assert torch.equal(cpu.conv2d.block_norms(case.dy, case.x, row[which], col[which], block, shape), expected)
    nothing = torch.empty(0, dtype=torch.int32)
    assert cpu.conv2d.block_norms(case.dy, case.x, nothing, nothing, block, shape).shape == (0,)


# The sketch.


def pairs_for(case: ConvCase, count: int) -> tuple[Tensor, Tensor]:
    return signs(count, case.grid.out_features, 0), signs(count, case.grid.in_features, 1)


def sketched(case: ConvCase, count: int) -> Tensor:
    return cpu.conv2d.sketch(case.dy, case.x, *pairs_for(case, count), case.grid.block, case.shape)


def plain_case(**given: object) -> ConvCase:
    """2 x 2 blocks a tap with an edge on both sides, 3x3; 2 images of 7x9."""
    settings = {
        "block": (16, 16),
        "kernel": (3, 3),
        "groups": 1,
        "group_out": 25,
        "group_in": 20,
        "dtype": torch.float32,
    }
    size = {"images": 2, "height": 7, "width": 9, "stride": (1, 1), "dilation": (1, 1), "padding": (1, 1, 1, 1)}
    return conv_case(0, **{**settings, **size, **given})


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("block", [(1, 1), (16, 16)])
def test_more_blocks_than_are_multiplied_together_and_more_pairs(block: tuple[int, int], groups: int) -> None:
    """Tiles have 32 x 32 blocks; here are 2 x 10 of them at 1x1. 9 pairs, where 8 are computed at a time."""
    case = plain_case(block=block, groups=groups, group_out=37, group_in=33, images=1, dtype=torch.float32)

    check_conv_sketch(case, sketched(case, 9), *pairs_for(case, 9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_taps_that_see_little_but_padding(dtype: torch.dtype) -> None:
    """A kernel larger than the image, dilated; a stride of 3 that leaves pixels out; padding on one side alone."""
    odd = {"kernel": (5, 3), "dilation": (2, 3), "stride": (3, 1), "padding": (8, 3, 1, 6), "height": 2, "width": 3}
    case = plain_case(group_in=35, dtype=dtype, **odd)

    check_conv_sketch(case, sketched(case, 3), *pairs_for(case, 3))


@pytest.mark.parametrize("block", [(1, 1), (16, 16)])
def test_threads_and_other_pairs_change_no_sketch(block: tuple[int, int], threads: Callable[[int], None]) -> None:
    """600 pixels: more than are held at a time."""
    case = plain_case(block=block, images=3, height=20, width=10, groups=2)
    expected = sketched(case, 5)
    check_conv_sketch(case, expected, *pairs_for(case, 5))
    for count in (2, 3, 2):
        threads(count)
        assert torch.equal(sketched(case, 5), expected)
    u, v = pairs_for(case, 5)
    assert torch.equal(cpu.conv2d.sketch(case.dy, case.x, u[:2], v[:2], block, case.shape), expected[:2])


def test_a_nan_reaches_only_the_sketches_of_its_blocks() -> None:
    """In the corner of the last image only four taps see it; in dy, in the middle, it meets all of them."""
    case = plain_case()
    x, dy = case.x.clone(), case.dy.clone()
    x[1, 17, 6, 8] = dy[1, 3, 3, 3] = float("nan")
    seen = torch.zeros(2, 9, 2, dtype=torch.bool)  # block rows; taps; block columns of a tap
    seen[:, [4, 5, 7, 8], 1] = True

    assert torch.equal(sketched(replace(case, x=x), 1)[0].isnan().view(2, 9, 2), seen)
    assert sketched(replace(case, dy=dy), 1)[0].isnan().all(1).tolist() == [True, False]


def test_a_sketch_of_nothing_is_zero() -> None:
    case = plain_case()
    u, v = pairs_for(case, 2)

    assert torch.equal(sketched(plain_case(images=0), 2), torch.zeros(2, 2, 18))
    assert cpu.conv2d.sketch(case.dy, case.x, u[:0], v[:0], (16, 16), case.shape).shape == (0, 2, 18)


def test_pairs_and_images_may_be_given_in_any_strides_and_as_negated_views() -> None:
    case = plain_case()
    u, v = pairs_for(case, 3)
    expected = sketched(case, 3)

    for given in ((u.double(), v.bfloat16()), (u.t().contiguous().t(), v.repeat(2, 1)[:3]), (negated(u), negated(v))):
        assert torch.equal(cpu.conv2d.sketch(case.dy, case.x, *given, (16, 16), case.shape), expected)
    turned = replace(case, dy=negated(case.dy), x=negated(case.x))
    assert torch.equal(sketched(turned, 3), expected)


def test_a_sketch_holds_projections_of_bounded_size() -> None:
    """Of 12,800 pixels and 9 taps of 128 channels a copy of all windows would be 59 MB."""
    shape = plain_case().shape._replace(in_channels=128, out_channels=128)
    x = dy = channels_last(torch.ones(2, 80, 80, 128))
    u, v = torch.ones(4, 128), torch.ones(4, 9 * 128)
    cpu.release_scratch()
    found = allocations(lambda: cpu.conv2d.sketch(dy, x, u, v, (16, 16), shape))

    assert cpu.scratch_bytes() <= 10 * 2**20
    assert found.peak < 2**20
