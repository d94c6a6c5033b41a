"""The launchers of the convolution: what they make when there is nothing to do, and the layout of the results."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from sparsekern.kernels import gpu
from sparsekern.kernels.contract import PADDING
from sparsekern.kernels.gpu import tables
from sparsekern.kernels.gpu.config import Config, Problem
from sparsekern.kernels.gpu.conv2d import kept_lists, lists_by_phase

import sparsekern
from sparsekern.topology import Topology, rebuild_
from tests.device import DEVICE, DTYPES, in_dtypes
from tests.gpu_checks import check_products, dvalues, dx, forced, fwd
from tests.gpu_conv2d_checks import (
    GATHER,
    PARTS,
    SHAPES,
    check_far_pixels,
    check_kernels,
    check_that_nan_stays_where_it_is_read,
    edge_case,
    whole_case,
)
from tests.oracle import check_op
from tests.oracle_conv2d import ConvCase, conv_case


@pytest.mark.parametrize("seed", range(8))
def test_drawn_convolutions(seed: int) -> None:
    """Of any kernel, stride, padding and dilation; without images, too."""
    check_kernels(conv_case(seed, block=(16, 16), groups=1 + seed % 2, group_out=21, group_in=24, dtype=torch.float32))


def test_the_op_runs_on_these_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the choice of a backend, forward and backward."""
    asked: list[str] = []

    def choose(problem: Problem, *call: object) -> Config:
        asked.append(problem.kernel)
        return GATHER[problem.kernel == "conv2d_dvalues"]

    monkeypatch.setattr(tables, "choose", choose)
    with sparsekern.backend("gpu"):
        check_op(edge_case(stride=(2, 2), images=1), DEVICE)
    assert sorted(asked) == ["conv2d_dvalues", "conv2d_dx", "conv2d_fwd"]


def test_pixels_behind_the_element_2_to_the_31() -> None:
    check_far_pixels()


def test_no_blocks_are_the_bias_and_zeros() -> None:
    case = whole_case(images=1, free=0)
    here = case.on(DEVICE)
    none = here.values[:0]
    index = here.index._replace(
        row_ptr=torch.zeros_like(here.index.row_ptr), col_ptr=torch.zeros_like(here.index.col_ptr),
        **{name: getattr(here.index, name)[-16:] for name in ("row_col", "row_slot", "col_row", "col_slot")},
    )  # fmt: skip
    with forced(*GATHER):
        y = gpu.conv2d.fwd(here.x, none, here.bias, index, case.shape)
        dx = gpu.conv2d.dx(here.dy, none, index, case.shape, case.size)
        dvalues = gpu.conv2d.dvalues(here.dy, here.x, index, (16, 16), case.shape, torch.float32)
    assert torch.equal(y, here.bias.view(1, -1, 1, 1).expand_as(y)) and not dx.any() and dvalues.shape == (0, 16, 16)


def test_the_gradient_of_no_images_is_zero() -> None:
    assert not dvalues(edge_case(images=0)).any()


def test_problems_are_counted_by_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 2 x 5 x 7 pixels a phase has up to 2 x 3 x 4; blocks are shared by 4 phases of 3 blocks of channels."""
    asked: list[Problem] = []
    healthy = tables.run
    monkeypatch.setattr(tables, "run", lambda problem, *call: asked.append(problem) or healthy(problem, *call))
    dx(edge_case(stride=(2, 2), blocks=46, free=2))
    assert [(p.kernel, p.log2_tokens, p.log2_blocks) for p in asked] == [("conv2d_dx", 5, 2)]


# The kernel of y and dx: taps, phases, groups, edges.


@pytest.mark.parametrize("name", SHAPES)
def test_any_convolution_by_gathered_blocks(name: str) -> None:
    images = 1 + ("stride" in SHAPES[name])
    check_kernels(edge_case(**SHAPES[name], images=images), *GATHER)


@pytest.mark.parametrize("name", ["padded", "dilated and strided", "grouped"])
def test_any_convolution_by_parts_of_blocks(name: str) -> None:
    check_kernels(edge_case(**SHAPES[name], block=(32, 32), images=1), *PARTS)


@pytest.mark.parametrize(("block", "dtype"), in_dtypes((16, 32), (32, 16)))
def test_rectangles_in_any_dtype(block: tuple[int, int], dtype: torch.dtype) -> None:
    check_kernels(edge_case(block=block, dtype=dtype, images=1), *GATHER)


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_that_fit(dtype: torch.dtype) -> None:
    check_kernels(whole_case(dtype=dtype, bias=False, stride=(2, 1)), *GATHER)


def test_as_it_is_configured_by_default() -> None:
    check_kernels(edge_case(block=(64, 64), images=1, height=3, width=4, blocks=6))


@pytest.mark.parametrize("stride", [(1, 1), (2, 2)])
def test_empty_rows_and_columns(stride: tuple[int, int]) -> None:
    """One block of all: the other rows are the bias, the other channels and phases zero."""
    check_kernels(edge_case(blocks=1, stride=stride), *GATHER)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 1)])
def test_phases_of_few_pixels_or_none(size: tuple[int, int]) -> None:
    """An image of one row has no pixel in the other phases of rows."""
    check_kernels(edge_case(height=size[0], width=size[1], stride=(3, 2), padding=(1, 2, 1, 1)), *GATHER)


def test_tiles_of_several_images() -> None:
    check_kernels(edge_case(images=9, height=2, width=2, kernel=(2, 2), stride=(2, 1)), *GATHER)


@pytest.mark.parametrize(("config", "block"), [(GATHER, (16, 16)), (PARTS, (32, 32))])
def test_a_nan_reaches_only_what_reads_it(config: tuple, block: tuple[int, int]) -> None:
    check_that_nan_stays_where_it_is_read(whole_case(block=block, blocks=6, images=1, height=3, width=3), *config)


def test_infinities_stay_infinite() -> None:
    """Padding is zero and adds nothing; what fills up a tile of blocks is zero on both sides."""
    case = whole_case(height=2, width=2, images=1, blocks=5)
    x, dy = (torch.full_like(part, float("inf")) for part in (case.x, case.dy))
    infinite = replace(case, x=x, dy=dy, values=case.values.abs(), bias=None)
    with forced(*GATHER):
        results = fwd(infinite), dx(infinite)
    for result in results:
        assert result.isinf().any() and not result.isnan().any()


def test_two_calls_agree_to_the_bit() -> None:
    case = edge_case(stride=(2, 2))
    with forced(*GATHER):
        assert torch.equal(dx(case), dx(case))


def test_values_of_another_dtype_are_rounded() -> None:
    check_products(edge_case(dtype=torch.float16, values_dtype=torch.float32, images=1), *GATHER)


# The lists of dx against lists made one block at a time.


def lists_by_hand(case: ConvCase) -> dict[tuple[int, int, int], list[tuple[int, int]]]:
    """Return by phase, group and block of channels the ``(tap, row of the group)`` and slot of each stored block."""
    grid, shape, found = case.grid, case.shape, {}
    for slot, (r, c) in enumerate(zip(case.row.tolist(), case.col.tolist(), strict=True)):
        if r >= 0:
            tap, block = divmod(c, grid.tap_cols)
            i, j = divmod(tap, shape.kernel[1])
            y = (i * shape.dilation[0] - shape.padding[0]) % shape.stride[0]
            x = (j * shape.dilation[1] - shape.padding[2]) % shape.stride[1]
            place = (y * shape.stride[1] + x, r // grid.group_rows, block)
            found.setdefault(place, []).append((tap * grid.group_rows + r % grid.group_rows, slot))
    return {place: sorted(entries) for place, entries in found.items()}


def test_lists_are_made_once_until_blocks_move(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    case, other = (edge_case(seed, stride=(2, 1), blocks=12).on(DEVICE) for seed in (0, 1))
    index, shape, block = case.index, case.shape, case.grid.block
    wanted = [lists_by_phase(c.index, shape, block) for c in (case, other)]
    monkeypatch.setattr(gpu.conv2d, "lists_by_phase", lambda *given: made.append(given) or lists_by_phase(*given))

    for _ in range(2):
        assert all(map(torch.equal, kept_lists(index, shape, block), wanted[0])) and len(made) == 1
    rebuild_(index, Topology(case.grid, other.row, other.col))  # in place, as a training method does
    for _ in range(2):
        assert all(map(torch.equal, kept_lists(index, shape, block), wanted[1])) and len(made) == 2
    kept_lists(index, shape._replace(dilation=(2, 2)), block)
    assert len(made) == 3
    with torch.inference_mode():  # writes into such an index are not counted
        uncounted = case.index
        for _ in range(2):
            kept_lists(uncounted, shape, block)
    assert len(made) == 5
    monkeypatch.setattr(gpu.conv2d, "on_default_stream", lambda device: device != index.col_slot.device)
    for _ in range(2):
        kept_lists(index, shape._replace(dilation=(2, 2)), block)
    assert len(made) == 7


@pytest.mark.parametrize("given", [*SHAPES.values(), {"blocks": 1}, {"group_in": 16 * 20, "kernel": (3, 5)}])
def test_lists(given: dict[str, Any]) -> None:
    """Also of more columns than a program reads at a time, and with groups that store nothing."""
    case = edge_case(**{"images": 1, "height": 6, "width": 9, **given})
    starts, numbers, slots = (n.cpu() for n in lists_by_phase(case.on(DEVICE).index, case.shape, case.grid.block))
    expected, groups, per_tap = lists_by_hand(case), case.shape.groups, case.grid.tap_cols

    stored = int((case.row >= 0).sum())
    assert starts[0] == 0 and starts[-1] == stored
    assert len(starts) == case.shape.stride[0] * case.shape.stride[1] * groups * per_tap + 1
    for number in range(len(starts) - 1):
        place = (number // per_tap // groups, number // per_tap % groups, number % per_tap)
        part = slice(int(starts[number]), int(starts[number + 1]))
        found = list(zip(numbers[part].tolist(), slots[part].tolist(), strict=True))
        assert found == expected.get(place, []), f"phase, group and block {place}"
    assert not numbers[stored : stored + PADDING].any() and not slots[stored : stored + PADDING].any()
