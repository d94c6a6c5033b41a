"""The native scores against the oracle, on every instruction set that the machine has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from sparsekern.kernels import cpu
from sparsekern.kernels.contract import LinearShape
from sparsekern.kernels.cpu import scores
from torch import Tensor

from tests.kernels.eager.test_scores import all_cells, check_norms
from tests.memory import allocations
from tests.oracle import DY_LAYOUTS, X_LAYOUTS, Case, random_case
from tests.oracle_scores import check_sketch, signs

pytestmark = pytest.mark.usefixtures("instructions")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCKS = ((1, 1), (16, 16), (32, 64), (128, 128))


def edge_case(**given: object) -> Case:
    """3 x 4 blocks of 16 x 32 with an edge on both sides."""
    settings = {"block": (16, 32), "rows": 3, "cols": 4, "out_features": 45, "in_features": 101, "tokens": 40}
    return random_case(0, **{"dtype": torch.float32, "dy_layout": "contiguous", **settings, **given})


def all_norms(case: Case) -> Tensor:
    return cpu.linear.all_block_norms(case.dy, case.x, case.grid.block, case.geometry)


def chosen(case: Case, which: Tensor) -> Tensor:
    row, col = all_cells(case)
    return cpu.linear.block_norms(case.dy, case.x, row[which], col[which], case.grid.block, case.geometry)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", BLOCKS)
def test_norms_of_all_blocks_and_dtypes(block: tuple[int, int], dtype: torch.dtype) -> None:
    for tokens in (0, 1, 17, 300):
        case = random_case(1, block=block, dtype=dtype, tokens=tokens)
        norms = all_norms(case)

        assert norms.shape == (case.grid.rows, case.grid.cols)
        check_norms(case, norms)
        check_norms(case, cpu.linear.block_norms(case.dy, case.x, *all_cells(case), block, case.geometry))


@pytest.mark.parametrize("dy_layout", DY_LAYOUTS)
def test_any_strides(dy_layout: str) -> None:
    case = edge_case(x_layout="columns of a wider one", dy_layout=dy_layout)

    check_norms(case, all_norms(case))


@pytest.mark.parametrize("block", [(1, 1), (16, 32)])
def test_blocks_are_chosen_in_any_order_and_more_than_once(block: tuple[int, int], generator: torch.Generator) -> None:
    case = edge_case(block=block, out_features=3 * block[0], in_features=4 * block[1])
    which = torch.randint(12, (50,), generator=generator)
    expected = chosen(case, torch.arange(12))

    check_norms(case, expected)
    assert torch.equal(chosen(case, which), expected[which])
    assert chosen(case, which[:0]).shape == (0,)


def test_many_single_elements_whose_columns_do_not_ascend(generator: torch.Generator) -> None:
    """Enough in a row that the kernel cuts its features into chunks."""
    case = edge_case(block=(1, 1), rows=5, cols=700, out_features=5, in_features=700)
    which = torch.randint(3500, (3000,), generator=generator)
    expected = (case.dy.double().T @ case.x.double()).abs().flatten()[which]

    assert torch.allclose(chosen(case, which).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", BLOCKS)
def test_chunks_change_nothing(block: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(2, block=block, tokens=33, dtype=torch.float32)
    which = torch.arange(case.grid.cells).flip(0)
    expected = all_norms(case), chosen(case, which)

    for size in (1, 3 * 4 * block[0] * block[1]):
        monkeypatch.setattr(scores, "CHUNK_BYTES", size)
        assert torch.equal(all_norms(case), expected[0])
        assert torch.equal(chosen(case, which), expected[1])


@pytest.mark.parametrize("block", [(1, 1), (32, 32)])
def test_threads_change_nothing(block: tuple[int, int], threads: Callable[[int], None]) -> None:
    side = 3 * 32 + 5
    rows = -(-side // block[0])
    case = random_case(
        3, block=block, rows=rows, cols=rows, out_features=side, in_features=side, tokens=300, dtype=torch.float32
    )
    expected = all_norms(case)
    for count in (2, 3):
        threads(count)
        assert torch.equal(all_norms(case), expected)


@pytest.mark.parametrize("which", ["dy", "x"])
def test_a_nan_reaches_only_the_blocks_that_it_belongs_to(which: str) -> None:
    """In dy a block row, in x a block column; also in the last one, which is filled up with zeros."""
    case = edge_case()
    for block in range(3):
        broken = {"dy": case.dy.clone(), "x": case.x.clone()}
        broken[which][3, block * case.grid.block[which == "x"]] = float("nan")
        expected = torch.zeros(3, 4, dtype=torch.bool)
        expected.select(int(which == "x"), block).fill_(True)

        assert torch.equal(all_norms(replace(case, **broken)).isnan(), expected)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_and_device_change_nothing(default: torch.dtype) -> None:
    for block in ((1, 1), (16, 32)):
        case = edge_case(block=block, out_features=3 * block[0], in_features=4 * block[1])
        cells = all_cells(case)
        expected = all_norms(case), cpu.linear.block_norms(case.dy, case.x, *cells, block, case.geometry)
        torch.set_default_dtype(default)
        try:
            with torch.device("meta"):
                found = all_norms(case), cpu.linear.block_norms(case.dy, case.x, *cells, block, case.geometry)
        finally:
            torch.set_default_dtype(torch.float32)

        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


def test_chosen_blocks_of_a_few_rows_need_only_these_rows_of_dy() -> None:
    """Rows 1 and 2 of three, the last one at the edge; a NaN elsewhere in dy is not even read."""
    case = edge_case()
    dy = case.dy.clone()
    dy[:, :16] = float("nan")
    row, col = all_cells(case)
    below = (row > 0).nonzero().flatten()

    assert torch.equal(chosen(replace(case, dy=dy), below), all_norms(case).flatten()[below])
    assert torch.equal(chosen(case, below[-1:]), all_norms(case).flatten()[row * 4 + col == 11])


def test_chosen_blocks_may_be_given_in_int64_and_in_any_strides() -> None:
    case = edge_case()
    row, col = all_cells(case)
    pairs = torch.stack([row, col], 1)

    for given in ((row.long(), col.long()), pairs.unbind(1), pairs.long().unbind(1)):
        assert torch.equal(
            cpu.linear.block_norms(case.dy, case.x, *given, case.grid.block, case.geometry), all_norms(case).flatten()
        )


def test_the_norms_of_all_blocks_never_hold_the_gradient() -> None:
    """G is 2048 x 2048, 16 MiB; a chunk of its blocks has 8 at most, set to 1 here."""
    dy = x = torch.ones(2, 2048)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "CHUNK_BYTES", 2**20)
        found = allocations(lambda: cpu.linear.all_block_norms(dy, x, (16, 16), LinearShape(x.shape[-1], dy.shape[-1])))

    assert found.largest <= 2**20
    assert found.peak < 2 * 2**20


def test_the_norms_of_single_elements_hold_little_beside_them() -> None:
    """4 million of them, 16 MiB; what says where an element is takes more than the element."""
    dy = x = torch.ones(2, 2048)
    cpu.release_scratch()
    found = allocations(lambda: cpu.linear.all_block_norms(dy, x, (1, 1), LinearShape(x.shape[-1], dy.shape[-1])))

    assert found.peak - 4 * 2048**2 + cpu.scratch_bytes() < 32 * 2**20


# The sketch.


def pairs_for(case: Case, count: int) -> tuple[Tensor, Tensor]:
    return signs(count, case.grid.out_features, seed=1), signs(count, case.grid.in_features, seed=2)


def sketched(case: Case, count: int) -> Tensor:
    return cpu.linear.sketch(case.dy, case.x, *pairs_for(case, count), case.grid.block, case.geometry)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [*BLOCKS, (64, 16), (32, 32)])
def test_sketches_of_all_blocks_and_dtypes(block: tuple[int, int], dtype: torch.dtype) -> None:
    for tokens, count in ((1, 1), (17, 3), (300, 8)):
        case = random_case(4, block=block, dtype=dtype, tokens=tokens)

        check_sketch(case, sketched(case, count), *pairs_for(case, count))


@pytest.mark.parametrize("dy_layout", DY_LAYOUTS)
@pytest.mark.parametrize("x_layout", X_LAYOUTS)
def test_a_sketch_of_any_strides(x_layout: str, dy_layout: str) -> None:
    for dtype in DTYPES:
        case = edge_case(x_layout=x_layout, dy_layout=dy_layout, dtype=dtype)

        check_sketch(case, sketched(case, 2), *pairs_for(case, 2))


@pytest.mark.parametrize("side", [1, 16])
def test_more_blocks_than_are_multiplied_together_and_more_pairs(side: int) -> None:
    """Tiles have 32 x 32 of them: here are 2 x 3 tiles, and 17 pairs where 8 are computed at a time."""
    grid = {"rows": 35, "cols": 70, "out_features": 35 * side - side // 2, "in_features": 70 * side - side // 2}
    case = random_case(5, block=(side, side), blocks=1, tokens=40, dtype=torch.float32, **grid)

    check_sketch(case, sketched(case, 17), *pairs_for(case, 17))


def test_a_sketch_whose_projections_are_held_for_the_fewest_tokens(threads: Callable[[int], None]) -> None:
    """1000 pairs: 64 KiB of projections a token leave 32 tokens at a time."""
    case = random_case(6, block=(16, 16), rows=1, cols=2, blocks=1, tokens=70, dtype=torch.float32)
    expected = sketched(case, 1000)
    threads(2)

    check_sketch(case, expected, *pairs_for(case, 1000))
    assert torch.equal(sketched(case, 1000), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [(1, 1), (16, 32)])
def test_threads_and_other_pairs_change_no_sketch(
    block: tuple[int, int], dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    case = random_case(7, block=block, tokens=600, dtype=dtype, out_features=200, in_features=250, **cells(block))
    expected = sketched(case, 9)
    for count in (2, 3, 2):
        threads(count)
        assert torch.equal(sketched(case, 9), expected)
    u, v = pairs_for(case, 9)
    assert torch.equal(cpu.linear.sketch(case.dy, case.x, u[:4], v[:4], block, case.geometry), expected[:4])


def cells(block: tuple[int, int]) -> dict[str, int]:
    return {"rows": -(-200 // block[0]), "cols": -(-250 // block[1]), "blocks": 1}


@pytest.mark.parametrize("which", ["dy", "x"])
def test_a_nan_reaches_only_the_sketches_of_its_blocks(which: str) -> None:
    case = edge_case()
    for block in range(3):
        broken = {"dy": case.dy.clone(), "x": case.x.clone()}
        broken[which][3, block * case.grid.block[which == "x"]] = float("nan")
        expected = torch.zeros(2, 3, 4, dtype=torch.bool)
        expected.select(1 + int(which == "x"), block).fill_(True)

        assert torch.equal(sketched(replace(case, **broken), 2).isnan(), expected)


def test_a_sketch_of_nothing_is_zero() -> None:
    case = edge_case()
    u, v = pairs_for(case, 2)

    assert torch.equal(
        cpu.linear.sketch(case.dy[:0], case.x[:0], u, v, case.grid.block, case.geometry), torch.zeros(2, 3, 4)
    )
    assert cpu.linear.sketch(case.dy, case.x, u[:0], v[:0], case.grid.block, case.geometry).shape == (0, 3, 4)


def test_pairs_may_be_given_in_any_strides_and_dtypes() -> None:
    case = edge_case()
    u, v = pairs_for(case, 3)
    expected = cpu.linear.sketch(case.dy, case.x, u, v, case.grid.block, case.geometry)

    for given in ((u.double(), v.bfloat16()), (u.t().contiguous().t(), v.repeat(2, 1)[:3]), (negated(u), negated(v))):
        assert torch.equal(cpu.linear.sketch(case.dy, case.x, *given, case.grid.block, case.geometry), expected)
    assert torch.equal(
        cpu.linear.sketch(negated(case.dy), negated(case.x), u, v, case.grid.block, case.geometry), expected
    )


def negated(x: Tensor) -> Tensor:
    """The same numbers as a view of memory that holds them with the other sign."""
    return torch.complex(torch.zeros(()), -x).conj().imag


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_and_device_change_no_sketch(default: torch.dtype) -> None:
    case = edge_case()
    u, v = pairs_for(case, 2)
    expected = sketched(case, 2)
    torch.set_default_dtype(default)
    try:
        with torch.device("meta"):
            found = cpu.linear.sketch(case.dy, case.x, u, v, case.grid.block, case.geometry)
            nothing = cpu.linear.sketch(case.dy[:0], case.x[:0], u, v, case.grid.block, case.geometry)
    finally:
        torch.set_default_dtype(torch.float32)

    assert torch.equal(found, expected)
    assert (nothing.dtype, nothing.device.type) == (torch.float32, "cpu")


def test_a_sketch_holds_projections_of_bounded_size() -> None:
    dy = x = torch.ones(2000, 1024)
    u = v = torch.ones(4, 1024)
    cpu.release_scratch()
    found = allocations(lambda: cpu.linear.sketch(dy, x, u, v, (16, 16), LinearShape(x.shape[-1], dy.shape[-1])))

    assert cpu.scratch_bytes() <= 10 * 2**20
    assert found.peak < 2**20
