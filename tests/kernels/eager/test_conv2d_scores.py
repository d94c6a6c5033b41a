from __future__ import annotations

import pytest
import torch
from sparsekern.kernels import eager
from sparsekern.kernels.contract import ConvShape
from sparsekern.kernels.eager import chunks, conv2d
from torch import Tensor

from tests.memory import allocations
from tests.oracle import DTYPES, all_cells, check_norms, check_sketch, signs
from tests.oracle_conv2d import ConvCase, conv_case


def ints(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def check_scores(case: ConvCase) -> None:
    block, shape = case.grid.block, case.shape
    u, v = signs(3, case.grid.out_features, 0), signs(3, case.grid.in_features, 1)
    check_norms(case, eager.conv2d.all_block_norms(case.dy, case.x, block, shape))
    check_norms(case, eager.conv2d.block_norms(case.dy, case.x, *all_cells(case), block, shape))
    check_sketch(case, eager.conv2d.sketch(case.dy, case.x, u, v, block, shape), u, v)


def test_by_hand() -> None:
    """A kernel of 1 x 2 over one channel of four pixels 1 2 3 4 and dy = 1 0 10: gradients 31 and 42."""
    shape = ConvShape(1, 1, (1, 2))
    x, dy = torch.tensor([[[[1.0, 2, 3, 4]]]]), torch.tensor([[[[1.0, 0, 10]]]])
    u, v = torch.tensor([[2.0]]), torch.tensor([[1.0, -1]])

    assert eager.conv2d.all_block_norms(dy, x, (1, 1), shape).tolist() == [[31, 42]]
    assert eager.conv2d.block_norms(dy, x, ints(0, 0), ints(1, 0), (1, 1), shape).tolist() == [42, 31]
    assert eager.conv2d.sketch(dy, x, u, v, (1, 1), shape).tolist() == [[[62, -84]]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [(1, 1), (4, 4), (3, 7), (16, 8)])
def test_scores_of_any_block_and_dtype(block: tuple[int, int], dtype: torch.dtype) -> None:
    check_scores(conv_case(21, block=block, dtype=dtype, images=2))


@pytest.mark.parametrize("seed", range(8))
def test_random_convolutions(seed: int) -> None:
    for case in range(10 * seed, 10 * seed + 10):
        check_scores(conv_case(case))


@pytest.mark.parametrize("tile", [1, 4, 9, 1000])
def test_tiles_meet_without_gap_or_overlap(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv2d, "TILE", tile)
    for seed in range(4):
        case = conv_case(seed, block=(4, 4), images=1, dtype=torch.float32)
        check_norms(case, eager.conv2d.all_block_norms(case.dy, case.x, (4, 4), case.shape))


@pytest.mark.parametrize("scratch", [1, 3000, 50_000])
def test_scores_do_not_depend_on_the_scratch(scratch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "SCRATCH_BYTES", scratch)
    for seed in range(5):
        check_scores(conv_case(seed))


def test_norms_of_no_blocks_and_of_no_images() -> None:
    case = conv_case(3, images=0)

    assert eager.conv2d.block_norms(case.dy, case.x, ints(), ints(), case.grid.block, case.shape).shape == (0,)
    assert not eager.conv2d.all_block_norms(case.dy, case.x, case.grid.block, case.shape).any()


def test_a_nan_reaches_only_the_blocks_that_it_belongs_to() -> None:
    """In one channel of dy: one block row; the rest of the grid stays finite."""
    case = conv_case(5, block=(4, 4), groups=1, group_out=11, group_in=6, kernel=(3, 3), images=1, dtype=torch.float32)
    dy = case.dy.clone()
    dy[0, 9] = float("nan")
    u, v = signs(2, 11, 0), signs(2, 54, 1)

    for nans in (
        eager.conv2d.all_block_norms(dy, case.x, (4, 4), case.shape).isnan(),
        eager.conv2d.block_norms(dy, case.x, *all_cells(case), (4, 4), case.shape).view(3, 18).isnan(),
        eager.conv2d.sketch(dy, case.x, u, v, (4, 4), case.shape)[0].isnan(),
    ):
        assert nans[2].any() and not nans[:2].any()


def test_the_scratch_stays_within_what_is_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "SCRATCH_BYTES", 2**20)
    given = {"block": (16, 16), "groups": 1, "group_out": 64, "group_in": 60, "kernel": (3, 3), "stride": (1, 1)}
    case = conv_case(0, height=30, width=34, images=2, dtype=torch.float16, dilation=(1, 1), **given)
    u, v = torch.randn(4, 64), torch.randn(4, 540)
    row, col = all_cells(case)

    for score in (
        lambda: eager.conv2d.all_block_norms(case.dy, case.x, (16, 16), case.shape),
        lambda: eager.conv2d.block_norms(case.dy, case.x, row, col, (16, 16), case.shape),
        lambda: eager.conv2d.sketch(case.dy, case.x, u, v, (16, 16), case.shape),
    ):
        assert allocations(score).peak <= chunks.SCRATCH_BYTES
