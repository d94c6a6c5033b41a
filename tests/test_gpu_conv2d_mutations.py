"""Broken Triton kernels of the convolution, as in :mod:`tests.test_gpu_mutations`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sparsekern.kernels.gpu import conv2d

from tests.broken_kernels import Check, Table, assert_noticed, mutations
from tests.device import interpreted_only
from tests.gpu_checks import check_all_block_norms, check_block_norms, check_outer, check_sketches
from tests.gpu_conv2d_checks import (
    GATHER,
    PARTS,
    SHAPES,
    SUPERTILE,
    check_far_pixels,
    check_kernels,
    check_that_nan_stays_where_it_is_read,
    check_that_phantom_elements_are_zero,
    edge_case,
    whole_case,
)

pytestmark = [interpreted_only, pytest.mark.usefixtures("poisoned_memory", "guarded_memory", "no_tables")]

# The checks.


def kernels(**given: Any) -> Check:
    return lambda: check_kernels(edge_case(**{"images": 1, **given}), *GATHER)


def parts(**given: Any) -> Check:
    return lambda: check_kernels(edge_case(**{"images": 1, "block": (32, 32), **given}), *PARTS)


def whole() -> None:
    check_kernels(whole_case(bias=False), *GATHER)


def nan_stays() -> None:
    check_that_nan_stays_where_it_is_read(whole_case(blocks=6, images=1, height=3, width=3), *GATHER)


def outer(**given: Any) -> Check:
    return lambda: check_outer(edge_case(**{"blocks": 9, **given}), *GATHER)


def in_splits() -> None:
    check_outer(edge_case(images=4, height=8, width=10, blocks=3), *GATHER)


def phantom() -> None:
    check_that_phantom_elements_are_zero(edge_case(padding=(0, 0, 0, 0)), *GATHER)


def block_norms(**given: Any) -> Check:
    return lambda: check_block_norms(edge_case(**{"images": 1, "kernel": (1, 2), **given}), *GATHER)


def all_block_norms(**given: Any) -> Check:
    return lambda: check_all_block_norms(edge_case(kernel=(2, 2), **given), SUPERTILE)


def sketch(**given: Any) -> Check:
    return lambda: check_sketches(edge_case(kernel=(2, 2), **given))


def sketch_in_panels() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conv2d, "SKETCH_BYTES", 1)
        check_sketches(edge_case(kernel=(1, 2)))


STRIDED, GROUPED, DILATED = SHAPES["strided"], SHAPES["grouped"], SHAPES["dilated"]

# The table.


TABLE: Table = {
    "conv2d_multiply.conv2d_multiply_kernel": [
        ("missing int64 cast of the pitch", check_far_pixels, "(groups * in_group).to(tl.int64)", "groups * in_group"),
        ("phase of rows forgotten", kernels(**STRIDED), "origin_y += phase_y", "origin_y += 0"),
        ("phase of columns forgotten", kernels(**STRIDED), "origin_x += phase_x", "origin_x += 0"),
        ("lists of the first phase only", kernels(**STRIDED),
         "start = tl.load(row_ptr_ptr + phase * all_rows + line)", "start = tl.load(row_ptr_ptr + line)"),
        ("phase stored on top of the first", kernels(**STRIDED),
         "phase_y * width_out + phase_x)", "phase_y * 0)"),
        ("phases of the same height", kernels(**STRIDED),
         "tl.cdiv(height_out - phase_y, DIV_Y)", "tl.cdiv(height_out, DIV_Y)"),
        ("stride of the result forgotten", kernels(**STRIDED),
         "some_y, some_x, DIV_Y, DIV_X)", "some_y, some_x, 1, 1)"),
        ("stride of the source forgotten", kernels(**STRIDED),
         "some_y, some_x, MUL_Y, MUL_X)", "some_y, some_x, 1, 1)"),
        ("all groups read the first", kernels(**GROUPED),
         "pixel * pitch + group * in_group", "pixel * pitch + group * 0"),
        ("all groups write the first", kernels(**GROUPED),
         "(group * group_out + feature)[None, :]", "feature[None, :]"),
        ("bias of the first group", kernels(**GROUPED), "bias_ptr + group * group_out", "bias_ptr + group * 0"),
        ("bias dropped", kernels(), "if HAS_BIAS:", "if False:"),
        ("gather: no bound of rows", kernels(),
         "is_inside(y[:, None] + off_y[None, :], height) &", ""),
        ("gather: no bound of columns", kernels(),
         " & is_inside(x[:, None] + off_x[None, :], width)", ""),
        ("parts: no bound of rows", parts(), "is_inside(y + off_y, height) &", ""),
        ("parts: no bound of columns", parts(), " & is_inside(x + off_x, width)", ""),
        ("gather: edge of the channels unmasked", kernels(**GROUPED), "(channel < in_group) if", "(channel >= 0) if"),
        ("parts: edge of the channels unmasked", parts(**GROUPED),
         "(channel < in_group)[None, :]", "(channel >= 0)[None, :]"),
        ("gather: tail of the row unmasked", kernels(), "in_row = i + k // IN < stop", "in_row = k >= 0"),
        ("gather: tail of the row unmasked in the source", nan_stays, "if EDGE_IN else in_row\n",
         "if EDGE_IN else k >= 0\n"),
        ("gather: pointer not advanced", kernels(), "slot_ptr, i + BLOCKS + k // IN,", "slot_ptr, start + k // IN,"),
        ("parts: pointer not advanced", parts(), "start + (i + 1) // PARTS", "start"),
        ("parts: part not advanced", parts(), "i % PARTS * TILE_K + k", "k"),
        ("parts: part of values not advanced", parts(), "offset += (i + 1) % PARTS", "offset += 0"),
        ("edge of the features unmasked", kernels(**GROUPED), "feature < group_out if EDGE_OUT else", ""),
        ("token mask dropped", kernels(**STRIDED, images=2),
         "mask=(t[:, None] < T) & n_mask", "mask=(t[:, None] >= 0) & n_mask"),
        ("last pixel not read again", whole, "pixel, y, x = place_of_token(tl.minimum(t, last)",
         "pixel, y, x = place_of_token(t"),
    ],
    "conv2d_multiply.place_of_block": [
        ("all taps the first", kernels(), "tap = quotient(number, per_tap, SIDE)", "tap = number * 0"),
        ("rows of the kernel for columns", kernels(kernel=(1, 3)),
         "(tap - i * kernel_width) * step_x", "i * step_x"),
        ("steps upside down", kernels(), "i * step_y) // DIV_Y", "0 - i * step_y) // DIV_Y"),
    ],
    "conv2d_multiply.lists_kernel": [
        ("lists: order of taps forgotten", kernels(), "tap * rows + row % rows", "row % rows"),
        ("lists: row of the whole weight", kernels(**GROUPED), "row % rows, mask", "row, mask"),
        ("lists: taps of all phases", kernels(**STRIDED), "high = tl.where(its == phase, high, low)", "high = high"),
        ("lists: phases before not counted", kernels(**STRIDED), "tl.where(its < phase, stop - start, 0)", "0"),
        ("lists: groups before not counted", kernels(**GROUPED), " + tl.where(its == phase, low - start, 0)", ""),
        ("lists: rows of all groups", kernels(**GROUPED),
         "high = tl.where(its == phase, high, low)", "high = tl.where(its == phase, stop, low)"),
        ("lists: wrong slot", kernels(), "begin + entry - low, slot, mask", "begin + entry - low, entry, mask"),
        ("lists: groups taken for one", kernels(**GROUPED), "if GROUPED:  # else", "if False:  # else"),
        ("lists: the end not written", kernels(), "tl.store(ptr_ptr + number + 1, begin, mask=last)", "pass"),
    ],
    "conv2d_multiply.phase_of_tap": [
        ("lists: padding of the other side", kernels(**STRIDED, padding=(1, 1, 2, 2)),
         "dilation_y - top", "dilation_y - left"),
        ("lists: dilation forgotten", kernels(**SHAPES["dilated and strided"]),
         "tap // kernel_width * dilation_y", "tap // kernel_width"),
    ],
    "conv2d_outer.conv2d_outer_kernel": [
        ("outer: missing int64 cast of the pitch", check_far_pixels,
         "(groups * in_group).to(tl.int64)", "groups * in_group"),
        ("outer: no bound of rows", outer(), "is_inside(y[None, :] + tap_y[:, None], height) &", ""),
        ("outer: no bound of columns", outer(), " & is_inside(x[None, :] + tap_x[:, None], width)", ""),
        ("outer: all taps the first", outer(), "tap = number // per_tap", "tap = number * 0"),
        ("outer: padding forgotten", outer(), "dilation_y - top", "dilation_y"),
        ("outer: dilation forgotten", outer(**DILATED), "tap // kernel_width * dilation_y", "tap // kernel_width"),
        ("outer: all groups read the first", outer(**GROUPED), "group * in_group + channel", "channel"),
        ("outer: all groups read the first of dy", outer(**GROUPED), "(group * out_group + feature)", "feature"),
        ("outer: token mask dropped", outer(),
         "here = t < (count - i if EDGE_T else TILE_T)", "here = t >= 0"),
        ("outer: edge mask of x dropped", outer(), "seen & (channel < in_group)[:, None] if EDGE_IN else", ""),
        ("outer: edge mask of dy dropped", outer(),
         "here[:, None] & (feature < out_group)[None, :] if EDGE_OUT else", ""),
        ("outer: pixels not advanced", outer(), "pixel, y, x = place_of_next_token(", "_, _, _ = place_of_next_token("),
        ("outer: pointer of dy not advanced", outer(), "tl.cast(i, tl.int64) * dy_pitch", "0"),
        ("outer: free slots not zeroed", outer(), "mask=(first + g // BI < stop)[:, None]",
         "mask=((first + g // BI < stop) & (row < all_rows))[:, None]"),
        ("outer: wrong slot", outer(), "tl.load(slot_ptr + entry).to(tl.int64)", "entry.to(tl.int64)"),
        ("outer: phantom not cleared", phantom, "if EDGE_IN or EDGE_OUT:", "if False:"),
        ("outer: all splits the first", in_splits, "begin = split * tokens_per_split", "begin = split * 0"),
        ("norms: the square kept", block_norms(), "tl.sqrt(tl.sum(tl.reshape", "(tl.sum(tl.reshape"),
    ],
    "conv2d_outer.conv2d_supertile_kernel": [
        ("supertile: no bound of rows", all_block_norms(), "is_inside(y + tap_y, height) &", ""),
        ("supertile: all groups the first", all_block_norms(groups=2), "(group * in_group + i)", "i"),
        ("supertile: taps in the place of one", all_block_norms(), "(tap * per_tap + c)", "c"),
        ("supertile: pixels not advanced", all_block_norms(),
         "pixel, y, x = place_of_next_token(", "_, _, _ = place_of_next_token("),
        ("supertile: mask of the norms dropped", all_block_norms(groups=2),
         "mask=(r < rows)[:, None] & (c < per_tap)[None, :]", ""),
    ],
    "conv2d_outer.conv2d_projection_kernel": [
        ("projection: no bound of columns", sketch(), " & is_inside(x + tap_x, width)", ""),
        ("projection: the first tap of directions", sketch(), "(line * taps + tap)", "(line * taps)"),
        ("projection: all groups the first", sketch(groups=2),
         "(groups * group_in) + group * group_in", "(groups * group_in)"),
        ("projection: the first panel only", sketch_in_panels, "place_of_token(first + t,", "place_of_token(t,"),
        ("projection: channels of another group", sketch(groups=2), " & (i < group_in)[None, :]", ""),
    ],
    "pixels": [
        ("pixels: no carry of columns", outer(padding=(0, 0, 0, 0)),
         "pixel + (STRIDE_Y * width - end_x)", "pixel"),
        ("pixels: no carry of rows", outer(padding=(0, 0, 0, 0), images=4),
         "pixel + (height - end_y) * width", "pixel"),
        ("pixels: y does not wrap", outer(images=3), "tl.where(carry, y - end_y, y), x", "y, x"),
        ("pixels: a coordinate below zero", kernels(),
         "place.to(tl.uint32, bitcast=True) < size.to(tl.uint32, bitcast=True)", "place < size"),
        ("pixels: the first image only", kernels(images=2), "token // (height_out * width_out) * height", "token * 0"),
        ("pixels: rounded down", kernels(group_in=100), "number.to(tl.float32) + 0.5", "number.to(tl.float32) - 0.001"),
    ],
    "conv2d": [
        ("dx by the taps of the forward", kernels(),
         "(-geometry.dilation[0], -geometry.dilation[1])", "geometry.dilation"),
        ("padding of the other side", kernels(padding=(1, 0, 2, 0)),
         "origin, step = (-top, -left)", "origin, step = (-left, -top)"),
        ("workspace not reduced", in_splits, "if splits > 1:", "if splits > 99:"),
        ("norms of splits added up", block_norms(images=8, groups=2), "NORMS=norms and splits == 1", "NORMS=norms"),
        ("nothing written without pixels", outer(images=0), "out.zero_()", "pass"),
        ("sketch: the first group of dy", sketch(groups=2), "enumerate(zip(part.chunk(groups, 1)",
         "enumerate(zip(part.chunk(groups, 1)[:1] * groups"),
    ],
    "launch": [
        ("the filling of images not cleared", kernels(**GROUPED), "filled[..., features:] = 0", "pass"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("check", [kernels(), parts(), whole, nan_stays, outer(), in_splits, phantom, block_norms()])
def test_healthy_kernels_pass(check: Check) -> None:
    """Their own tests show it of the other checks."""
    check()


@pytest.mark.parametrize(("place", "check", "old", "new"), mutations(TABLE))
def test_a_broken_kernel_is_noticed(
    place: str, check: Check, old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_noticed(place, check, old, new, tmp_path, monkeypatch)
