from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from sparsekern.kernels import eager
from sparsekern.kernels.contract import PADDING, Index
from sparsekern.kernels.eager import chunks
from sparsekern.kernels.eager.linear import multiply, outer_blocks
from sparsekern.kernels.eager.products import entry_owners
from torch import Tensor

from tests.memory import allocations
from tests.oracle import Case, check_kernels, random_case


def ints(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def at(row: Tensor, col: Tensor) -> Callable[[int, int], tuple[Tensor, Tensor]]:
    return lambda start, stop: (row[start:stop], col[start:stop])


def test_entry_owners() -> None:
    """Rows of 2, 0, 0, 3, 1, 0 entries, and two free slots: they get row 6, which does not exist."""
    assert entry_owners(ints(0, 2, 2, 2, 5, 6, 6), 0, 8).tolist() == [0, 0, 3, 3, 3, 4, 6, 6]
    assert entry_owners(ints(0, 2, 2, 2, 5, 6, 6), 4, 7).tolist() == [3, 4, 6]


def test_entry_owners_of_nothing_but_free_slots() -> None:
    assert entry_owners(ints(0, 0, 0), 0, 3).tolist() == [2, 2, 2]


def test_multiply_by_hand() -> None:
    """Two blocks of 1 x 2 in a weight of 2 x 4: 1 2 in the first row, 3 4 in the second, side by side.

    1 2 . .
    . . 3 4
    """
    x = torch.tensor([[1.0, 10, 100, 1000]])
    values = torch.tensor([[[3.0, 4]], [[1, 2]]])  # slot 1 comes first in the row order

    lists = (ints(0, 1, 2), ints(0, 1, *[0] * PADDING), ints(1, 0, *[0] * PADDING))
    index = Index(*lists, *lists)

    y = multiply(x, values, torch.tensor([0.5, 0.25]), index, 2, transposed=False)
    dx = multiply(torch.tensor([[1.0, 10]]), values, None, index, 4, transposed=True)

    assert y.tolist() == [[21.5, 4300.25]]
    assert dx.tolist() == [[1, 2, 30, 40]]


def test_outer_blocks_by_hand() -> None:
    """``dy' x`` is 3 x 3; blocks of 2 x 2 stick out below and to the right."""
    dy = torch.tensor([[1.0, 2, 3], [0, 1, 0]])
    x = torch.tensor([[1.0, 10, 100], [7, 0, 0]])  # dy' x = [1 10 100], [9 20 200], [3 30 300]

    blocks = torch.cat(
        [part.clone() for _, _, part in outer_blocks(dy, x, at(ints(0, 1, 0), ints(0, 1, 1)), 3, (2, 2))]
    )

    assert blocks.tolist() == [[[1, 10], [9, 20]], [[300, 0], [0, 0]], [[100, 0], [200, 0]]]


def test_outer_blocks_come_in_order_and_cover_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "SCRATCH_BYTES", 4000)
    case = random_case(0, block=(4, 4), rows=5, cols=5, blocks=20, free=0, tokens=9, dtype=torch.float32)

    pieces = [(start, stop) for start, stop, _ in outer_blocks(case.dy, case.x, at(case.row, case.col), 20, (4, 4))]

    assert len(pieces) > 3
    assert [i for start, stop in pieces for i in range(start, stop)] == list(range(20))


def test_outer_blocks_have_zeros_in_the_phantom_part_whatever_dy_and_x_hold() -> None:
    nan = torch.full((2, 3), float("nan"))

    (part,) = (part.clone() for _, _, part in outer_blocks(nan, nan, at(ints(1), ints(1)), 1, (2, 2)))

    assert part[0, 0, 0].isnan()
    assert part.flatten().tolist()[1:] == [0, 0, 0]


@pytest.mark.parametrize("scratch", [1, 1000, 10_000, 100_000])
@pytest.mark.parametrize("block", [(1, 1), (4, 8), (16, 16), (7, 3)])
def test_the_result_does_not_depend_on_the_scratch(
    block: tuple[int, int], scratch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From one token and one block at a time to everything at once."""
    monkeypatch.setattr(chunks, "SCRATCH_BYTES", scratch)
    for seed, dtype in enumerate((torch.float32, torch.bfloat16)):
        check_kernels(eager, random_case(seed, block=block, tokens=33, dtype=dtype))


# Declared scratch.


def big_case(block: tuple[int, int], out_features: int, in_features: int, tokens: int, dtype: torch.dtype) -> Case:
    rows, cols = -(-out_features // block[0]), -(-in_features // block[1])
    return random_case(
        0,
        block=block,
        rows=rows,
        cols=cols,
        out_features=out_features,
        in_features=in_features,
        blocks=max(1, rows * cols // 10),
        free=0,
        tokens=tokens,
        dtype=dtype,
        bias=True,
        x_layout="contiguous",
        dy_layout="contiguous",
    )


def bytes_beside(call: Callable[[], Tensor]) -> int:
    """Return the most bytes that ``call`` holds at once beside its inputs and its result."""
    return allocations(call).peak - call().nbytes


def kernel_peaks(case: Case) -> dict[str, int]:
    """Return what each kernel allocates beside its inputs and its output, in bytes, at the worst moment."""
    grid, index, dtype = case.grid, case.index, case.values.dtype
    at_0 = (case.row.clamp(min=0), case.col.clamp(min=0))
    u, v = torch.randn(4, grid.out_features), torch.randn(4, grid.in_features)
    return {
        "fwd": bytes_beside(lambda: eager.linear.fwd(case.x, case.values, case.bias, index, case.geometry)),
        "dx": bytes_beside(lambda: eager.linear.dx(case.dy, case.values, index, case.geometry)),
        "dvalues": bytes_beside(lambda: eager.linear.dvalues(case.dy, case.x, index, grid.block, case.geometry, dtype)),
        "block_norms": bytes_beside(
            lambda: eager.linear.block_norms(case.dy, case.x, *at_0, grid.block, case.geometry)
        ),
        "all_block_norms": bytes_beside(
            lambda: eager.linear.all_block_norms(case.dy, case.x, grid.block, case.geometry)
        ),
        "sketch": bytes_beside(lambda: eager.linear.sketch(case.dy, case.x, u, v, grid.block, case.geometry)),
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("block", "out_features", "in_features"),
    [
        ((32, 32), 512, 512),
        ((32, 32), 1000, 64),  # the sums are most of what a panel holds ...
        ((32, 32), 64, 1000),  # ... or the filled up input
        ((16, 128), 500, 1021),  # what is gathered is wider than the sums
        ((128, 16), 1021, 500),
        ((1, 1), 60, 70),
    ],
)
def test_the_scratch_stays_within_what_is_declared(
    block: tuple[int, int], out_features: int, in_features: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several panels of tokens and several chunks of blocks, in a scratch made small to keep the test so."""
    monkeypatch.setattr(chunks, "SCRATCH_BYTES", 2**20)
    case = big_case(block, out_features, in_features, 1000, dtype)

    over = {name: peak for name, peak in kernel_peaks(case).items() if peak > chunks.SCRATCH_BYTES}

    assert not over, f"more than {chunks.SCRATCH_BYTES} bytes: {over}"


def test_a_layer_whose_single_token_exceeds_the_scratch_still_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "SCRATCH_BYTES", 1000)
    case = random_case(0, block=(16, 16), rows=30, cols=30, blocks=40, free=2, tokens=5, dtype=torch.float32)

    check_kernels(eager, case)


def test_multiply_does_not_write_to_its_arguments() -> None:
    case = random_case(3, block=(1, 1), rows=6, cols=6, blocks=20, free=2, tokens=4, dtype=torch.float32)
    before = [t.clone() for t in (case.x, case.values, case.dy, case.row, case.col)]

    check_kernels(eager, case)

    for tensor, copy in zip((case.x, case.values, case.dy, case.row, case.col), before, strict=True):
        assert torch.equal(tensor, copy)
