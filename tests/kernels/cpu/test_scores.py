"""The native scores against the oracle, on every instruction set that the machine has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from sparsekern.kernels import cpu, eager
from sparsekern.kernels.cpu import scores
from torch import Tensor

from tests.kernels.eager.test_scores import all_cells, check_norms
from tests.memory import allocations
from tests.oracle import DY_LAYOUTS, Case, random_case

pytestmark = pytest.mark.usefixtures("instructions")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCKS = ((1, 1), (16, 16), (32, 64), (128, 128))


def edge_case(**given: object) -> Case:
    """3 x 4 blocks of 16 x 32 with an edge on both sides."""
    settings = {"block": (16, 32), "rows": 3, "cols": 4, "out_features": 45, "in_features": 101, "tokens": 40}
    return random_case(0, **{"dtype": torch.float32, "dy_layout": "contiguous", **settings, **given})


def all_norms(case: Case) -> Tensor:
    return cpu.all_block_norms(case.dy, case.x, case.grid.block)


def chosen(case: Case, which: Tensor) -> Tensor:
    row, col = all_cells(case)
    return cpu.block_norms(case.dy, case.x, row[which], col[which], case.grid.block)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", BLOCKS)
def test_norms_of_all_blocks_and_dtypes(block: tuple[int, int], dtype: torch.dtype) -> None:
    for tokens in (0, 1, 17, 300):
        case = random_case(1, block=block, dtype=dtype, tokens=tokens)
        norms = all_norms(case)

        assert norms.shape == (case.grid.rows, case.grid.cols)
        check_norms(case, norms)
        check_norms(case, cpu.block_norms(case.dy, case.x, *all_cells(case), block))


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
        expected = all_norms(case), cpu.block_norms(case.dy, case.x, *cells, block)
        torch.set_default_dtype(default)
        try:
            with torch.device("meta"):
                found = all_norms(case), cpu.block_norms(case.dy, case.x, *cells, block)
        finally:
            torch.set_default_dtype(torch.float32)

        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


def test_chosen_blocks_may_be_given_in_int64_and_in_any_strides() -> None:
    case = edge_case()
    row, col = all_cells(case)
    pairs = torch.stack([row, col], 1)

    for given in ((row.long(), col.long()), pairs.unbind(1), pairs.long().unbind(1)):
        assert torch.equal(cpu.block_norms(case.dy, case.x, *given, case.grid.block), all_norms(case).flatten())


def test_the_sketch_is_that_of_the_eager_kernels() -> None:
    assert cpu.sketch is eager.sketch


def test_the_norms_of_all_blocks_never_hold_the_gradient() -> None:
    """G is 2048 x 2048, 16 MiB; a chunk of its blocks has 8 at most, set to 1 here."""
    dy = x = torch.ones(2, 2048)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "CHUNK_BYTES", 2**20)
        found = allocations(lambda: cpu.all_block_norms(dy, x, (16, 16)))

    assert found.largest <= 2**20
    assert found.peak < 2 * 2**20


def test_the_norms_of_single_elements_hold_little_beside_them() -> None:
    """4 million of them, 16 MiB; what says where an element is takes more than the element."""
    dy = x = torch.ones(2, 2048)
    cpu.release_scratch()
    found = allocations(lambda: cpu.all_block_norms(dy, x, (1, 1)))

    assert found.peak - 4 * 2048**2 + cpu.scratch_bytes() < 32 * 2**20
