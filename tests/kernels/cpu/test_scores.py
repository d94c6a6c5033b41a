"""The native scores of linear layers and of convolutions by the oracle, on every instruction set here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from sparsekern.kernels import cpu
from sparsekern.kernels.cpu import products
from torch import Tensor

from tests.kernels.cpu.calls import (
    DTYPES,
    NAN,
    PLAIN,
    AnyCase,
    all_norms,
    chosen_norms,
    kernels,
    negated,
    sketch,
    small_conv,
)
from tests.memory import allocations
from tests.oracle import Case, check_norms, check_sketch, random_case, signs
from tests.oracle_conv2d import ConvCase, channels_last, conv_case

pytestmark = pytest.mark.usefixtures("instructions")

Make = Callable[..., Any]
BLOCKS = ((1, 1), (16, 16), (32, 64), (128, 128))


def edge_case(**given: Any) -> Case:
    """3 x 4 blocks of 16 x 32 with an edge on both sides."""
    settings = {"block": (16, 32), "rows": 3, "cols": 4, "out_features": 45, "in_features": 101, "tokens": 40}
    return random_case(0, **{**settings, "dtype": torch.float32, "dy_layout": "contiguous", **given})


def edge_conv(**given: Any) -> ConvCase:
    """2 x 2 blocks a tap with an edge on both sides, 3x3; 2 images of 7x9."""
    settings = {"block": (16, 16), "groups": 1, "group_out": 25, "group_in": 20, "blocks": 1, "free": 1}
    return small_conv(**{**settings, "images": 2, "height": 7, "width": 9, **given})


both = pytest.mark.parametrize("make", [edge_case, edge_conv], ids=["linear", "conv2d"])


def cells(case: AnyCase, which: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rows and columns of all blocks, or of some by their number."""
    keys = torch.arange(case.grid.cells, dtype=torch.int32) if which is None else which.int()
    return keys // case.grid.cols, keys % case.grid.cols


def chosen(case: AnyCase, which: Tensor) -> Tensor:
    return chosen_norms(case, *cells(case, which))


def check_all_norms(case: AnyCase) -> None:
    found = all_norms(case)
    assert found.shape == (case.grid.rows, case.grid.cols)
    check_norms(case, found)
    check_norms(case, chosen_norms(case, *cells(case)))


# Norms.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", BLOCKS)
def test_norms_of_all_blocks_and_dtypes(block: tuple[int, int], dtype: torch.dtype) -> None:
    for tokens in (0, 1, 17, 300):
        check_all_norms(random_case(1, block=block, dtype=dtype, tokens=tokens))
    for seed in range(3) if block != (128, 128) else ():
        check_all_norms(conv_case(seed, block=block, dtype=dtype))


@both
@pytest.mark.parametrize("block", [(1, 1), (16, 32)])
def test_blocks_are_chosen_in_any_order_and_more_than_once(
    block: tuple[int, int], make: Make, generator: torch.Generator
) -> None:
    features = {"out_features": 3 * block[0], "in_features": 4 * block[1]} if make is edge_case else {}
    case = make(block=block, **features)
    which = torch.randint(case.grid.cells, (50,), generator=generator)
    expected = chosen(case, torch.arange(case.grid.cells))

    check_norms(case, expected)
    if block != (1, 1):  # all elements are computed in larger blocks
        assert torch.equal(all_norms(case).flatten(), expected)
    if block != (1, 1) or make is edge_case:  # the chunks of a convolution follow from how many are chosen
        assert torch.equal(chosen(case, which), expected[which])
    assert chosen(case, which[:0]).shape == (0,)


def test_many_single_elements_whose_columns_do_not_ascend(generator: torch.Generator) -> None:
    """Enough in a row that the kernel cuts its features into chunks."""
    case = edge_case(block=(1, 1), rows=5, cols=700, out_features=5, in_features=700)
    which = torch.randint(3500, (3000,), generator=generator)
    expected = (case.dy.double().T @ case.x.double()).abs().flatten()[which]

    assert torch.allclose(chosen(case, which).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_size_of_chunks_changes_nothing(block: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    cases: list[AnyCase] = [random_case(2, block=block, tokens=33, dtype=torch.float32)]
    if block == (16, 16):
        cases.append(conv_case(3, block=block, images=2, dtype=torch.float32))
    for case in cases:
        which = torch.arange(case.grid.cells).flip(0)
        monkeypatch.undo()
        expected = all_norms(case), chosen(case, which)
        for size in (1, 3 * 4 * block[0] * block[1], 20_000):
            monkeypatch.setattr(products, "CHUNK_BYTES", size)
            assert torch.equal(all_norms(case), expected[0])
            assert torch.equal(chosen(case, which), expected[1])


@pytest.mark.parametrize("block", [(1, 1), (32, 32)])
def test_threads_change_nothing(block: tuple[int, int], threads: Callable[[int], None]) -> None:
    side = 3 * 32 + 5
    rows = -(-side // block[0])
    sizes = {"rows": rows, "cols": rows, "out_features": side, "in_features": side, "tokens": 300}
    case = random_case(3, block=block, dtype=torch.float32, **sizes)
    expected = all_norms(case)
    for count in (2, 3):
        threads(count)
        assert torch.equal(all_norms(case), expected)


def test_chosen_blocks_of_a_few_rows_need_only_these_rows_of_dy() -> None:
    """Rows 1 and 2 of three, the last one at the edge; a NaN elsewhere in dy is not even read."""
    case = edge_case()
    dy = case.dy.clone()
    dy[:, :16] = NAN
    below = torch.arange(4, 12)

    assert torch.equal(chosen(replace(case, dy=dy), below), all_norms(case).flatten()[below])
    assert torch.equal(chosen(case, below[-1:]), all_norms(case).flatten()[below[-1:]])


def test_chosen_blocks_may_be_given_in_int64_and_in_any_strides() -> None:
    case = edge_case()
    row, col = cells(case)
    pairs = torch.stack([row, col], 1)

    for given in ((row.long(), col.long()), pairs.unbind(1), pairs.long().unbind(1)):
        assert torch.equal(chosen_norms(case, *given), all_norms(case).flatten())


def test_the_norms_of_all_blocks_never_hold_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """G is 2048 x 2048, 16 MiB; a chunk of its blocks has 8 at most, set to 1 here."""
    monkeypatch.setattr(products, "CHUNK_BYTES", 2**20)
    found = allocations(lambda: all_norms(wide_case((16, 16), 2)))

    assert found.largest <= 2**20
    assert found.peak < 2 * 2**20


def test_the_norms_of_single_elements_hold_little_beside_them() -> None:
    """4 million of them, 16 MiB; the lists of their places take more than an element."""
    case = wide_case((1, 1), 2)
    cpu.release_scratch()
    found = allocations(lambda: all_norms(case))

    assert found.peak - 4 * 2048**2 + cpu.scratch_bytes() < 32 * 2**20


def wide_case(block: tuple[int, int], tokens: int, side: int = 2048) -> Case:
    sizes = {"rows": side // block[0], "cols": side // block[1], "out_features": side, "in_features": side}
    return random_case(0, block=block, blocks=1, tokens=tokens, **sizes, **PLAIN)


# The sketch.


def pairs_for(case: AnyCase, count: int) -> tuple[Tensor, Tensor]:
    return signs(count, case.grid.out_features, seed=1), signs(count, case.grid.in_features, seed=2)


def sketched(case: AnyCase, count: int) -> Tensor:
    return sketch(case, *pairs_for(case, count))


def check_sketched(case: AnyCase, count: int) -> None:
    check_sketch(case, sketched(case, count), *pairs_for(case, count))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [*BLOCKS, (64, 16), (32, 32)])
def test_sketches_of_all_blocks_and_dtypes(block: tuple[int, int], dtype: torch.dtype) -> None:
    for tokens, count in ((1, 1), (17, 3), (300, 8)):
        check_sketched(random_case(4, block=block, dtype=dtype, tokens=tokens), count)
    for seed in range(3) if block in BLOCKS[:3] else ():
        check_sketched(conv_case(seed, block=block, dtype=dtype), 3)


@pytest.mark.parametrize("side", [1, 16])
def test_more_blocks_than_are_multiplied_together_and_more_pairs(side: int) -> None:
    """Tiles have 32 x 32 of them: here are 2 x 3 tiles, and 17 pairs where 8 are computed at a time."""
    grid = {"rows": 35, "cols": 70, "out_features": 35 * side - side // 2, "in_features": 70 * side - side // 2}
    check_sketched(random_case(5, block=(side, side), blocks=1, tokens=40, dtype=torch.float32, **grid), 17)
    for groups in (1, 2):  # 2 x 10 tiles at 1x1
        check_sketched(edge_conv(block=(side, side), groups=groups, group_out=37, group_in=33, images=1), 9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_taps_that_see_little_but_padding(dtype: torch.dtype) -> None:
    """A kernel larger than the image, dilated; a stride of 3 that leaves pixels out; padding on one side alone."""
    odd = {"kernel": (5, 3), "dilation": (2, 3), "stride": (3, 1), "padding": (8, 3, 1, 6), "height": 2, "width": 3}
    check_sketched(edge_conv(group_in=35, dtype=dtype, **odd), 3)


@pytest.mark.parametrize("stride", [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("padding", [(0, 0, 0, 0), (0, 6, 0, 8), (1, 0, 1, 0)])
def test_the_sketch_of_a_kernel_of_one_pixel(stride: tuple[int, int], padding: tuple[int, int, int, int]) -> None:
    """Without stride and padding its pixels are the tokens of a linear layer; with both there may be as many."""
    check_sketched(edge_conv(kernel=(1, 1), stride=stride, padding=padding, groups=2), 3)


def test_a_sketch_whose_projections_are_held_for_the_fewest_tokens(threads: Callable[[int], None]) -> None:
    """1000 pairs: 64 KiB of projections a token leave 32 tokens at a time."""
    case = random_case(6, block=(16, 16), rows=1, cols=2, blocks=1, tokens=70, dtype=torch.float32)
    expected = sketched(case, 1000)
    threads(2)

    check_sketched(case, 1000)
    assert torch.equal(sketched(case, 1000), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [(1, 1), (16, 16), (16, 32)])
def test_threads_and_other_pairs_change_no_sketch(
    block: tuple[int, int], dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    """600 tokens or pixels: more than are held at a time."""
    grid = {"rows": -(-200 // block[0]), "cols": -(-250 // block[1]), "out_features": 200, "in_features": 250}
    cases: list[AnyCase] = [random_case(7, block=block, tokens=600, dtype=dtype, blocks=1, **grid)]
    if dtype is torch.float32:
        cases.append(edge_conv(block=block, images=3, height=20, width=10, groups=2))
        check_sketched(cases[-1], 5)
    for case in cases:
        threads(1)
        expected = sketched(case, 9)
        for count in (2, 3, 2):
            threads(count)
            assert torch.equal(sketched(case, 9), expected)
        u, v = pairs_for(case, 9)
        assert torch.equal(sketch(case, u[:4], v[:4]), expected[:4])


def test_a_nan_reaches_only_the_sketches_of_the_taps_that_see_it() -> None:
    """In the corner of the last image only four taps see it; in dy, in the middle, it meets all of them."""
    case = edge_conv()
    x, dy = case.x.clone(), case.dy.clone()
    x[1, 17, 6, 8] = dy[1, 3, 3, 3] = NAN
    seen = torch.zeros(2, 9, 2, dtype=torch.bool)  # block rows; taps; block columns of a tap
    seen[:, [4, 5, 7, 8], 1] = True

    assert torch.equal(sketched(replace(case, x=x), 1)[0].isnan().view(2, 9, 2), seen)
    assert sketched(replace(case, dy=dy), 1)[0].isnan().all(1).tolist() == [True, False]


@both
def test_pairs_may_be_given_in_any_strides_and_dtypes_and_all_as_negated_views(make: Make) -> None:
    case = make()
    u, v = pairs_for(case, 3)
    expected = sketch(case, u, v)

    for given in ((u.double(), v.bfloat16()), (u.t().contiguous().t(), v.repeat(2, 1)[:3]), (negated(u), negated(v))):
        assert torch.equal(sketch(case, *given), expected)
    assert torch.equal(sketch(replace(case, dy=negated(case.dy), x=negated(case.x)), u, v), expected)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("block", [(1, 1), (16, 32)])
def test_the_default_dtype_and_device_change_nothing(default: torch.dtype, block: tuple[int, int]) -> None:
    case = edge_case(block=block, out_features=3 * block[0], in_features=4 * block[1])
    row, col = cells(case)
    u, v = pairs_for(case, 2)

    def calls() -> tuple[Tensor, ...]:
        return all_norms(case), chosen_norms(case, row, col), sketch(case, u, v)

    expected = calls()
    nothing = replace(case, dy=case.dy[:0], x=case.x[:0])
    torch.set_default_dtype(default)
    try:
        with torch.device("meta"):
            found, empty = calls(), sketch(nothing, u, v)
    finally:
        torch.set_default_dtype(torch.float32)

    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert (empty.dtype, empty.device.type) == (torch.float32, "cpu")


@pytest.mark.parametrize("case", ["linear", "conv2d"])
def test_a_sketch_holds_projections_of_bounded_size(case: str) -> None:
    """Of 12,800 pixels and 9 taps of 128 channels a copy of all windows would be 59 MB."""
    if case == "linear":
        made: AnyCase = wide_case((16, 16), 2000, 1024)
    else:
        images = channels_last(torch.ones(2, 80, 80, 128))
        made = replace(edge_conv(group_in=128, group_out=128), x=images, dy=images)
    run, block = kernels(made), made.grid.block
    u, v = torch.ones(4, made.grid.out_features), torch.ones(4, made.grid.in_features)
    cpu.release_scratch()
    found = allocations(lambda: run.sketch(made.dy, made.x, u, v, block, made.geometry))

    assert cpu.scratch_bytes() <= 10 * 2**20
    assert found.peak < 2**20
