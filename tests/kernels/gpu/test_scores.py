"""The launchers of norms and sketches: order, panels, and nothing to do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sparsekern.kernels import gpu
from sparsekern.kernels.contract import LinearShape
from sparsekern.kernels.gpu import linear
from torch import Tensor

from tests.device import DEVICE, DTYPES
from tests.gpu_checks import check_all_block_norms, check_block_norms, check_sketches, corners
from tests.oracle import DY_LAYOUTS, X_LAYOUTS, signs

BLOCK = (16, 16)


def ints(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [(16, 16), (64, 32), (16, 128)])
def test_all_scores_as_they_are_configured_by_default(block: tuple[int, int], dtype: torch.dtype) -> None:
    case = corners(block, dtype=dtype)

    check_block_norms(case)
    check_all_block_norms(case)
    check_sketches(case)


@pytest.mark.parametrize("tokens", [0, 5])
def test_scores_are_float32_whatever_the_default_dtype(tokens: int) -> None:
    here = corners(BLOCK, tokens=tokens).on(DEVICE)
    u, v = torch.ones(2, here.dy.shape[1], device=DEVICE), torch.ones(2, here.x.shape[1], device=DEVICE)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        results = (
            gpu.linear.block_norms(here.dy, here.x, ints(0), ints(0), BLOCK, here.geometry),
            gpu.linear.all_block_norms(here.dy, here.x, BLOCK, here.geometry),
            gpu.linear.sketch(here.dy, here.x, u, v, BLOCK, here.geometry),
        )
    finally:
        torch.set_default_dtype(before)

    assert [r.dtype for r in results] == [torch.float32] * 3


def test_a_sketch_of_no_directions_is_empty() -> None:
    here = corners(BLOCK).on(DEVICE)
    none = torch.ones(0, here.dy.shape[1], device=DEVICE), torch.ones(0, here.x.shape[1], device=DEVICE)

    assert gpu.linear.sketch(here.dy, here.x, *none, BLOCK, here.geometry).shape == (0, here.grid.rows, here.grid.cols)


def test_norms_by_hand() -> None:
    """``dy' x`` with one number in three of its four blocks; they are asked for in any order, one of them twice."""
    dy, x = torch.zeros(3, 32, device=DEVICE), torch.zeros(3, 32, device=DEVICE)
    dy[0, 0] = dy[1, 1] = dy[2, 31] = 1
    x[0, 0], x[1, 5], x[2, 31] = 3, 4, -2  # the corner above left holds 3 and 4, that below right -2

    assert gpu.linear.all_block_norms(dy, x, BLOCK, LinearShape(x.shape[-1], dy.shape[-1])).tolist() == [[5, 0], [0, 2]]
    assert gpu.linear.block_norms(
        dy, x, ints(1, 0, 1, 0), ints(1, 0, 0, 0), BLOCK, LinearShape(x.shape[-1], dy.shape[-1])
    ).tolist() == [2, 5, 0, 5]


@pytest.mark.parametrize("row", [0, 2])
def test_norms_of_blocks_in_one_row_only(row: int) -> None:
    here = corners(BLOCK).on(DEVICE)

    norms = gpu.linear.block_norms(here.dy, here.x, ints(row, row, row), ints(3, 0, 2), BLOCK, here.geometry)

    assert torch.equal(
        norms,
        gpu.linear.block_norms(here.dy, here.x, ints(row, row, row), ints(0, 2, 3), BLOCK, here.geometry)[[2, 0, 1]],
    )


def test_norms_of_no_blocks() -> None:
    here = corners(BLOCK).on(DEVICE)

    assert gpu.linear.block_norms(here.dy, here.x, ints(), ints(), BLOCK, here.geometry).shape == (0,)


def test_scores_of_no_tokens_are_zero() -> None:
    here = corners(BLOCK, tokens=0).on(DEVICE)
    u, v = signs(2, 37, 0).to(DEVICE), signs(2, 55, 1).to(DEVICE)

    assert gpu.linear.all_block_norms(here.dy, here.x, BLOCK, here.geometry).tolist() == [[0.0] * 4] * 3
    assert gpu.linear.block_norms(here.dy, here.x, ints(0, 1), ints(0, 3), BLOCK, here.geometry).tolist() == [0, 0]
    assert gpu.linear.sketch(here.dy, here.x, u, v, BLOCK, here.geometry).tolist() == [[[0.0] * 4] * 3] * 2


@pytest.mark.parametrize("tokens", [1, 64, 65, 200])
def test_sketches_over_several_panels(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A panel has at least one tile of 64 tokens."""
    monkeypatch.setattr(linear, "SKETCH_BYTES", 1)

    check_sketches(corners(BLOCK, tokens=tokens))


def test_what_a_sketch_holds_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """3 directions, 3 + 4 blocks, 4 bytes: 84 bytes a token; 200 tokens and no whole number of tiles."""
    monkeypatch.setattr(linear, "SKETCH_BYTES", 84 * 200)
    panels = []
    healthy = linear.project
    monkeypatch.setattr(linear, "project", lambda x, *rest: panels.append(x.shape[0]) or healthy(x, *rest))

    check_sketches(corners(BLOCK, tokens=400))

    assert panels == [192, 192, 192, 192, 16, 16]


def test_sketches_of_micro_batches_add_up() -> None:
    case = corners(BLOCK, tokens=33)
    here, u, v = case.on(DEVICE), signs(3, 37, 0).to(DEVICE), signs(3, 55, 1).to(DEVICE)

    parts = [
        gpu.linear.sketch(here.dy[t : t + 8], here.x[t : t + 8], u, v, BLOCK, case.geometry) for t in range(0, 33, 8)
    ]

    torch.testing.assert_close(
        torch.stack(parts).sum(0), gpu.linear.sketch(here.dy, here.x, u, v, BLOCK, case.geometry)
    )


@pytest.mark.parametrize("layout", DY_LAYOUTS)
def test_scores_of_any_strides(layout: str) -> None:
    case = corners(BLOCK, dy_layout=layout, x_layout=layout if layout in X_LAYOUTS else "contiguous")

    check_block_norms(case)
    check_all_block_norms(case)
    check_sketches(case)


@pytest.mark.parametrize("which", ["dy", "x"])
def test_a_nan_reaches_only_the_blocks_that_it_belongs_to(which: str) -> None:
    """In dy a block row, in x a block column; also in the last one, which sticks out."""
    case = corners(BLOCK)
    u, v = signs(2, 37, 0).to(DEVICE), signs(2, 55, 1).to(DEVICE)
    row, col = (n.to(DEVICE) for n in (torch.arange(12).int() // 4, torch.arange(12).int() % 4))
    for block in (0, 2):
        broken = getattr(case, which).clone()
        broken[3, block * 16] = float("nan")
        here = replace(case, **{which: broken}).on(DEVICE)
        expected = torch.zeros(3, 4, dtype=torch.bool)
        expected.select(int(which == "x"), block).fill_(True)

        assert torch.equal(gpu.linear.all_block_norms(here.dy, here.x, BLOCK, case.geometry).isnan().cpu(), expected)
        assert torch.equal(
            gpu.linear.block_norms(here.dy, here.x, row, col, BLOCK, case.geometry).view(3, 4).isnan().cpu(), expected
        )
        assert torch.equal(
            gpu.linear.sketch(here.dy, here.x, u, v, BLOCK, case.geometry).isnan().cpu(), expected.expand(2, 3, 4)
        )
