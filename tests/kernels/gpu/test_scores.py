"""The launchers of norms and sketches, of layers and of convolutions: order, panels, and nothing to do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sparsekern.kernels import gpu
from sparsekern.kernels.contract import LinearShape
from sparsekern.kernels.gpu import conv2d, linear
from sparsekern.kernels.gpu.linear import PROJECTED
from torch import Tensor

from tests.device import DEVICE, in_dtypes
from tests.gpu_checks import calls, check_all_block_norms, check_block_norms, check_sketches, corners, norms_in
from tests.gpu_conv2d_checks import SHAPES, edge_case
from tests.kernels.calls import AnyCase, directions, ints
from tests.oracle import DY_LAYOUTS, X_LAYOUTS, all_cells

BLOCK = (16, 16)
SMALL = {"linear": corners(BLOCK), "conv2d": edge_case(images=1, height=3, width=3, kernel=(1, 2))}
NOTHING = {"linear": corners(BLOCK, tokens=0), "conv2d": edge_case(images=0)}
each = pytest.mark.parametrize("name", SMALL)


def scores(case: AnyCase, pairs: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Return the norms of all blocks, the same one by one, and a sketch, each ``(..., R, C)``."""
    one_by_one = calls.chosen_norms(case, *all_cells(case)).view(case.grid.rows, case.grid.cols)
    return calls.all_norms(case).cpu(), one_by_one.cpu(), calls.sketch(case, *directions(case, pairs)).cpu()


# By the oracle.


@pytest.mark.parametrize(("block", "dtype"), in_dtypes((16, 16), (64, 32), (16, 128)))
def test_all_scores_as_they_are_configured_by_default(block: tuple[int, int], dtype: torch.dtype) -> None:
    case = corners(block, dtype=dtype)

    check_block_norms(case)
    check_all_block_norms(case)
    check_sketches(case)


@pytest.mark.parametrize("name", SHAPES)
def test_the_sketch_of_any_convolution(name: str) -> None:
    check_sketches(edge_case(**SHAPES[name]), pairs=2)


@pytest.mark.parametrize(("block", "dtype"), in_dtypes((16, 32), (128, 128)))
def test_the_sketch_of_a_convolution_of_any_dtype_and_side(block: tuple[int, int], dtype: torch.dtype) -> None:
    check_sketches(edge_case(block=block, dtype=dtype, kernel=(1, 2), images=1))


@pytest.mark.parametrize("layout", DY_LAYOUTS)
def test_scores_of_any_strides(layout: str) -> None:
    case = corners(BLOCK, dy_layout=layout, x_layout=layout if layout in X_LAYOUTS else "contiguous")

    check_block_norms(case)
    check_all_block_norms(case)
    check_sketches(case)


def test_norms_by_hand() -> None:
    """``dy' x`` with one number in three of its four blocks; they are asked for in any order, one of them twice."""
    dy, x, shape = torch.zeros(3, 32, device=DEVICE), torch.zeros(3, 32, device=DEVICE), LinearShape(32, 32)
    dy[0, 0] = dy[1, 1] = dy[2, 31] = 1
    x[0, 0], x[1, 5], x[2, 31] = 3, 4, -2  # the corner above left holds 3 and 4, that below right -2
    places = ints(1, 0, 1, 0).to(DEVICE), ints(1, 0, 0, 0).to(DEVICE)

    assert gpu.linear.all_block_norms(dy, x, BLOCK, shape).tolist() == [[5, 0], [0, 2]]
    assert gpu.linear.block_norms(dy, x, *places, BLOCK, shape).tolist() == [2, 5, 0, 5]


# Order, dtype, nothing to do.


@each
def test_norms_in_any_order(name: str) -> None:
    case, order = SMALL[name], torch.arange(SMALL[name].grid.cells)

    assert torch.equal(norms_in(case, order), norms_in(case, order.flip(0)))


@pytest.mark.parametrize("row", [0, 2])
def test_norms_of_blocks_in_one_row_only(row: int) -> None:
    case, rows = SMALL["linear"], ints(row, row, row)

    found = calls.chosen_norms(case, rows, ints(3, 0, 2))
    assert torch.equal(found, calls.chosen_norms(case, rows, ints(0, 2, 3))[[2, 0, 1]])


@each
@pytest.mark.parametrize("cases", [SMALL, NOTHING], ids=["", "nothing"])
def test_scores_are_float32_whatever_the_default_dtype(cases: dict[str, AnyCase], name: str) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        results = scores(cases[name])
    finally:
        torch.set_default_dtype(before)

    assert [r.dtype for r in results] == [torch.float32] * 3


@each
def test_scores_of_nothing_are_zero_and_no_blocks_have_no_norms(name: str) -> None:
    case = NOTHING[name]

    for score in scores(case):
        assert torch.equal(score, torch.zeros_like(score))
    assert calls.chosen_norms(SMALL[name], ints(), ints()).shape == (0,)
    assert calls.chosen_norms(case, ints(), ints()).shape == (0,)
    none = calls.sketch(SMALL[name], *directions(SMALL[name], 0))
    assert none.shape == (0, SMALL[name].grid.rows, SMALL[name].grid.cols)


# Panels of a sketch.


@pytest.mark.parametrize("tokens", [1, 64, 65, 200])
def test_sketches_over_several_panels(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A panel has at least one tile of 64 tokens."""
    monkeypatch.setattr(linear, "SKETCH_BYTES", 1)

    check_sketches(corners(BLOCK, tokens=tokens))


def test_sketches_of_images_over_several_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of at least one tile of pixels each, over the end of images."""
    monkeypatch.setattr(conv2d, "SKETCH_BYTES", 1)
    panels = []
    healthy = conv2d._project
    monkeypatch.setattr(conv2d, "_project", lambda *args: panels.append(args[2]) or healthy(*args))

    check_sketches(edge_case(images=3, groups=2, group_out=20, group_in=20), pairs=2)

    assert panels == [(0, PROJECTED), (PROJECTED, 105 - PROJECTED)]


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
    u, v = directions(case, 3)
    parts = [replace(case, dy=dy, x=x) for dy, x in zip(case.dy.split(8), case.x.split(8), strict=True)]

    torch.testing.assert_close(sum(calls.sketch(part, u, v) for part in parts), calls.sketch(case, u, v))


@pytest.mark.parametrize("which", ["dy", "x"])
def test_a_nan_reaches_only_the_blocks_that_it_belongs_to(which: str) -> None:
    """In dy a block row, in x a block column; also in the last one, which sticks out."""
    case = corners(BLOCK)
    for block in (0, 2):
        broken = getattr(case, which).clone()
        broken[3, block * 16] = float("nan")
        expected = torch.zeros(3, 4, dtype=torch.bool)
        expected.select(int(which == "x"), block).fill_(True)

        for score in scores(replace(case, **{which: broken})):
            assert torch.equal(score.isnan(), expected.expand_as(score))
