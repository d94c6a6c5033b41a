"""Broken Triton kernels, one at a time: the text of a source is edited, and a check of the suite must turn red.

A row of the table names the check, and what is replaced by what. The convolution's own kernels are in
:mod:`tests.test_gpu_conv2d_mutations`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from sparsekern.kernels import gpu
from sparsekern.kernels.gpu.config import Outer

from tests.broken_kernels import Check, Table, assert_noticed, checks, mutations
from tests.device import interpreted_only
from tests.gpu_checks import (
    CUT_PRODUCTS,
    HOLES,
    OUTERS,
    PRODUCTS,
    SUPERTILE,
    check_all_block_norms,
    check_block_norms,
    check_far_tokens,
    check_far_values,
    check_outer,
    check_products,
    check_sketches,
    check_that_nan_of_a_block_stays_in_its_row,
    check_that_nan_stays_where_it_is_read,
    corners,
    drawn,
    dvalues,
    far_apart,
    forced,
)

pytestmark = [interpreted_only, pytest.mark.usefixtures("poisoned_memory", "guarded_memory", "no_tables")]

# The checks.


@cache
def products(name: str) -> Check:
    return lambda: check_products(PRODUCTS[name].edge_case(), PRODUCTS[name].config)


@cache
def cut_products(name: str) -> Check:
    return lambda: check_products(CUT_PRODUCTS[name].edge_case(), CUT_PRODUCTS[name].config)


@cache
def aligned_products(name: str) -> Check:
    return lambda: check_products(PRODUCTS[name].case(HOLES, free=0), PRODUCTS[name].config)


@cache
def expanded(name: str) -> Check:
    return lambda: check_products(PRODUCTS[name].case(dy_layout="one number expanded"), PRODUCTS[name].config)


@cache
def half_products(name: str) -> Check:
    return lambda: check_products(PRODUCTS[name].edge_case(dtype=torch.float16), PRODUCTS[name].config)


@cache
def nan_stays(name: str) -> Check:
    def check() -> None:
        check_that_nan_stays_where_it_is_read(PRODUCTS[name])
        check_that_nan_of_a_block_stays_in_its_row(PRODUCTS[name])

    return check


@cache
def far_values(name: str) -> Check:
    return lambda: check_far_values(PRODUCTS[name])


@cache
def far_tokens(name: str) -> Check:
    return lambda: check_far_tokens(PRODUCTS[name])


@cache
def outer(name: str, tokens: int = 37) -> Check:
    return lambda: check_outer(corners(OUTERS[name][1], tokens=tokens), OUTERS[name][0])


def outer_far() -> None:
    case = drawn(("xx",), block=(16, 16), tokens=33, out_features=16, in_features=32, dtype=torch.float16)
    check_outer(replace(case, x=far_apart(case.x), dy=far_apart(case.dy)), Outer(32, 16, 4, 3))
    check_outer(replace(case, x=far_apart(case.x), dy=far_apart(case.dy)), Outer(32, 64, 4, 3))


def outer_of_no_tokens() -> None:
    check_outer(corners((16, 16), tokens=0))


def phantom_is_zero() -> None:
    config, (bo, bi) = OUTERS["groups"]
    case = corners((bo, bi), tokens=5)
    with forced(config):
        grad = dvalues(replace(case, x=torch.full_like(case.x, torch.nan), dy=torch.full_like(case.dy, torch.nan)))
    assert not grad[case.row == 2, bo - 11 :, :].any() and not grad[case.col == 3, :, bi - 9 :].any()


@cache
def block_norms(tokens: int = 37) -> Check:
    return lambda: check_block_norms(corners((16, 16), tokens=tokens), Outer(64, 16, 4, 3))


def all_block_norms() -> None:
    check_all_block_norms(corners((16, 16)), SUPERTILE)


def sketch() -> None:
    check_sketches(corners((16, 16), tokens=70))


def sketch_in_panels() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu.linear, "SKETCH_BYTES", 1)
        check_sketches(corners((16, 16), tokens=70))


# The table.


OUTER_STORE = "out = out_ptr + (slot * (BO * BI) + g % BI)[:, None] + (n * BI)[None, :]"
SPLIT_SLOT = "slot = tl.load(slot_ptr + entry).to(tl.int64) + split.to(tl.int64) * slots"
GATHER_AHEAD = "slot_ptr, i + BLOCKS + k // IN,"
PARTS_AHEAD = "start + (i + 1) // PARTS"
PART = "part = (i + 1) % PARTS * TILE_K"
PART_OF_BLOCK = "tl.expand_dims(k, K_AXIS) * STRIDE_K + tl.expand_dims(n, T_AXIS) * STRIDE_N"
PART_OF_BLOCK_TRANSPOSED = "tl.expand_dims(k, K_AXIS) * STRIDE_N + tl.expand_dims(n, T_AXIS) * STRIDE_K"
VALUES_MASK = ", mask=tl.expand_dims(in_row, K_AXIS), other=0.0"

TABLE: Table = {
    "multiply.place_of_entry": [
        ("wrong slot", products("gather"), "tl.load(slot_ptr + entry)", "entry"),
        ("values: missing int64 cast", far_values("gather"), ".to(tl.int64) * SIZE", " * SIZE"),
        ("few: missing int64 cast of values", far_values("few gather"), ".to(tl.int64) * SIZE", " * SIZE"),
    ],
    "multiply.multiply_kernel": [
        ("x: missing int64 cast", far_tokens("gather"), "tile.to(tl.int64) * TILE_T", "tile * TILE_T"),
        ("token bound of x dropped", aligned_products("gather"), "tl.minimum(t, T - 1)[:, None]", "t[:, None]"),
        ("gather: every program the first piece", cut_products("gather"), "line % CUT * TILE_N", "0"),
    ],
    "multiply.add_blocks": [
        ("gather: pointer not advanced", products("gather"), GATHER_AHEAD, "slot_ptr, start + k // IN,"),
        ("few gather: pointer not advanced", products("few gather"), GATHER_AHEAD, "slot_ptr, start + k // IN,"),
        ("parts: pointer not advanced", products("parts"), PARTS_AHEAD, "start"),
        ("few parts: pointer not advanced", products("few parts"), PARTS_AHEAD, "start"),
        ("parts: part not advanced", products("parts"), PART, "part = 0"),
        ("few parts: part forgotten", products("few parts"), PART, "part = 0"),
        ("parts: part of values not advanced", products("parts"), "offset += part * STRIDE_K", "offset += 0"),
        ("parts: block transposed", products("parts"), PART_OF_BLOCK, PART_OF_BLOCK_TRANSPOSED),
        ("few parts: block transposed", products("few parts"), PART_OF_BLOCK, PART_OF_BLOCK_TRANSPOSED),
        ("gather: edge mask of x dropped", products("gather"), "(columns < in_features)", "(columns >= 0)"),
        ("few gather: edge mask of x dropped", products("few gather"), "(columns < in_features)", "(columns >= 0)"),
        ("parts: edge mask of x dropped", products("parts"), "column + k < in_features", "column + k >= 0"),
        ("gather: tail of the row unmasked", products("gather"), "in_row = i + k // IN < stop", "in_row = k >= 0"),
        ("few gather: tail of the row unmasked", products("few gather"),
         "in_row = i + k // IN < stop", "in_row = k >= 0"),
        ("gather: tail of the row unmasked in values", nan_stays("gather"), VALUES_MASK, ""),
        ("few gather: tail of the row unmasked in values", nan_stays("few gather"), VALUES_MASK, ""),
        ("gather: tail of the row unmasked in x", nan_stays("gather"),
         "if EDGE_IN else in_row,", "if EDGE_IN else k >= 0,"),
        ("few gather: tail of the row unmasked in x", nan_stays("few gather"), "else t_mask & seen\n", "else t_mask\n"),
    ],
    "multiply.place_of_tile": [
        ("group tail unmasked", products("gather"), "size = tl.minimum(tiles - first, GROUP)", "size = GROUP"),
        ("tma: group tail unmasked", products("tma"), "size = tl.minimum(tiles - first, GROUP)", "size = GROUP"),
    ],
    "multiply.store_tile": [
        ("bias dropped", products("gather"), "if HAS_BIAS:", "if False:"),
        ("edge mask of y dropped", products("gather"), "feature < out_features if EDGE_OUT else", ""),
        ("token mask of y dropped", aligned_products("gather"),
         "mask=(t[:, None] < T) & n_mask", "mask=(t[:, None] >= 0) & n_mask"),
    ],
    "multiply.multiply_tma_kernel": [
        ("tma: part forgotten", products("tma"), PART, "part = 0"),
        ("tma: part of values forgotten", products("tma"),
         "values_desc.load([slot + first, part])", "values_desc.load([slot + first, 0])"),
        ("tma: part of values forgotten in dx", half_products("tma"),
         "values_desc.load([slot + part, first])", "values_desc.load([slot, first])"),
        ("tma: pointer not advanced", products("tma"), PARTS_AHEAD, "start"),
        ("tma: every program the first piece", cut_products("tma"), "line % CUT * TILE_N", "0"),
        ("tma: wrong slot", products("tma"), "tl.load(slot_ptr + ahead) * BO", "ahead * BO"),
        ("tma: lines of the other side", products("tma"), "IN if TRANSPOSED else OUT", "OUT if TRANSPOSED else IN"),
    ],
    "multiply.few_tokens_kernel": [
        ("few: token mask dropped", aligned_products("few gather"),
         "t_mask = t[None, :] < T", "t_mask = t[None, :] >= 0"),
        ("few: edge mask of y dropped", products("few gather"),
         "n_mask = feature < out_features", "n_mask = feature >= 0"),
        ("few: bias dropped", products("few gather"), "if HAS_BIAS:", "if False:"),
        ("few: missing int64 cast of x", far_tokens("few gather"),
         "x_ptr + t.to(tl.int64)[None, :]", "x_ptr + t[None, :]"),
        ("few: all pieces the first", products("few gather"), "tl.program_id(0) % PIECES * TILE_N", "0"),
    ],
    "outer.outer_kernel": [
        ("outer: splits longer than the tokens", outer("groups"),
         "count = tl.minimum(tokens_per_split, T - begin)", "count = tokens_per_split"),
        ("outer: token mask dropped", outer("groups"), "here = t < (count - i if EDGE_T else TILE_T)", "here = t >= 0"),
        ("outer: edge mask of x dropped", outer("groups"),
         "here[None, :] & (column < in_width)[:, None] if EDGE_IN else", ""),
        ("outer: edge mask of dy dropped", outer("groups"),
         "here[:, None] & (feature < out_width)[None, :] if EDGE_OUT else", ""),
        ("outer: pointer of x not advanced", outer("groups"), "x_ptrs + ahead * x_stride", "x_ptrs"),
        ("outer: pointer of dy not advanced", outer("groups"), "dy_ptrs + ahead * dy_stride", "dy_ptrs"),
        ("outer: missing int64 cast of a turn", outer_far, "ahead = tl.cast(i, tl.int64)", "ahead = i"),
        ("outer: missing int64 cast of a token", outer_far, "token = begin.to(tl.int64) + t", "token = begin + t"),
        ("outer: block transposed", outer("groups"),
         OUTER_STORE, OUTER_STORE.replace("g % BI)", "g % BI * BO)").replace("(n * BI)", "n")),
        ("outer: wrong slot", outer("groups"), "tl.load(slot_ptr + entry).to(tl.int64)", "entry.to(tl.int64)"),
        ("outer: tail of the group unmasked", outer("groups"),
         "mask=(first + g // BI < stop)[:, None]", "mask=(g >= 0)[:, None]"),
        ("outer: free slots not zeroed", outer("groups"),
         "mask=(first + g // BI < stop)[:, None]", "mask=((first + g // BI < stop) & (row < rows))[:, None]"),
        ("outer: phantom not cleared", phantom_is_zero, "if EDGE_IN or EDGE_OUT:", "if False:"),
        ("outer: phantom cleared behind the filling only", phantom_is_zero,
         "(column < in_features)[:, None] & (feature < out_features)",
         "(column < in_width)[:, None] & (feature < out_width)"),
        ("outer: all splits the first", outer("groups", 300), "begin = split * tokens_per_split", "begin = split * 0"),
        ("outer: splits on top of each other", outer("groups", 300),
         SPLIT_SLOT, "slot = tl.load(slot_ptr + entry).to(tl.int64)"),
        ("outer: all pieces the first", outer("pieces"), "g = piece * TILE_IN", "g = 0 * TILE_IN"),
        ("norms: tail of the group unmasked", block_norms(), "mask=first + b < stop", "mask=b >= 0"),
        ("norms: the square kept", block_norms(), "tl.sqrt(tl.sum(tl.reshape", "(tl.sum(tl.reshape"),
    ],
    "outer.place_of_group": [
        ("outer: wrong row", outer("groups"), "// BLOCKS + middle <= task", "// BLOCKS + middle < task"),
    ],
    "outer.sum_splits_kernel": [
        ("first split only", outer("groups", 300), "for split in range(splits):", "for split in range(1):"),
    ],
    "linear": [
        ("workspace not reduced", outer("groups", 300), "if splits > 1:", "if splits > 99:"),
        ("outer: nothing written without tokens", outer_of_no_tokens, "out.zero_()", "pass"),
        ("norms of splits added up", block_norms(300), "NORMS=norms and splits == 1", "NORMS=norms"),
        ("dx by the row lists", products("gather"),
         "index.by_col", "index.by_row"),
        ("gather: block transposed", products("gather"),
         "(bi, 1) if transposed else (1, bi)", "(1, bi) if transposed else (bi, 1)"),
        ("dx: the strides of the copy forgotten", products("gather"), "stride_k, stride_n = 1, bo", "pass"),
        ("norms in the order of rows", block_norms(), "order.int()", "order.argsort().int()"),
        ("sketch: the first panel only", sketch_in_panels,
         "x[start : start + panel]", "x[: min(panel, tokens - start)]"),
    ],
    "outer.supertile_kernel": [
        ("supertile: token mask of dy dropped", all_block_norms,
         "mask=(t < T - begin)[None, :] & o_mask", "mask=o_mask"),
        ("supertile: all tiles of the first columns", all_block_norms, "tl.program_id(0) // tiles", "0"),
        ("supertile: edge mask of x dropped", all_block_norms, "(i < in_units * ALIGN)", "(i >= 0)"),
        ("supertile: mask of the norms dropped", all_block_norms, "mask=(r < rows)[:, None] & (c < cols)[None, :]", ""),
        ("supertile: every fourth row of G", all_block_norms,
         "(ROWS, BO, COLS, BI)), 3), 1)", "(BO, ROWS, COLS, BI)), 3), 0)"),
    ],
    "outer.projection_kernel": [
        ("projection: feature mask dropped", sketch, "(t < T)[:, None] & (i < features)[None, :]", "(t < T)[:, None]"),
        ("projection: token mask dropped", sketch,
         "out, tl.sum(x * direction[None, :], 1), mask=t < T", "out, tl.sum(x * direction[None, :], 1)"),
        ("projection: the first direction only", sketch, "direction_ptr + line * features", "direction_ptr"),
    ],
    "launch": [
        ("the filling not cleared", products("gather"), "rows[:, features:] = 0", "pass"),
        ("a feature stride ignored", expanded("gather"), "x.stride(1) == 1 and ", ""),
    ],
}  # fmt: skip


@pytest.mark.parametrize("check", checks(TABLE))
def test_healthy_kernels_pass(check: Check) -> None:
    check()


@pytest.mark.parametrize(("place", "check", "old", "new"), mutations(TABLE))
def test_a_broken_kernel_is_noticed(
    place: str, check: Check, old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_noticed(place, check, old, new, tmp_path, monkeypatch)
