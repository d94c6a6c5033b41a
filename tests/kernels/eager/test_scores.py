from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sparsekern.kernels import eager
from sparsekern.kernels.contract import LinearShape
from sparsekern.kernels.eager import chunks, linear
from torch import Tensor

from tests.oracle import DTYPES, DY_LAYOUTS, Case, all_cells, check_norms, check_sketch, random_case, signs

NAN = float("nan")


def ints(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def edge_case(**given: object) -> Case:
    """3 x 4 blocks of 4 x 3 with an edge on both sides."""
    settings = {"block": (4, 3), "rows": 3, "cols": 4, "out_features": 11, "in_features": 10, "tokens": 7}
    return random_case(0, **{**settings, "dtype": torch.float32, "dy_layout": "contiguous", **given})


# Norms.


def test_norms_by_hand() -> None:
    """``dy' x`` in blocks of 2 x 2; the last row and column of blocks stick out.

    3 4 | 0
    0 0 | 2
    --------
    6 8 | 1
    """
    dy, x = torch.eye(3), torch.tensor([[3.0, 4, 0], [0, 0, 2], [6, 8, 1]])

    assert eager.linear.all_block_norms(dy, x, (2, 2), LinearShape(x.shape[-1], dy.shape[-1])).tolist() == [
        [5, 2],
        [10, 1],
    ]
    assert eager.linear.block_norms(
        dy, x, ints(1, 0, 0), ints(0, 1, 0), (2, 2), LinearShape(x.shape[-1], dy.shape[-1])
    ).tolist() == [10, 2, 5]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [(1, 1), (4, 4), (3, 7), (16, 8), (64, 64)])
def test_norms_of_any_block_and_dtype(block: tuple[int, int], dtype: torch.dtype) -> None:
    case = random_case(21, block=block, dtype=dtype, tokens=19)

    check_norms(case, eager.linear.all_block_norms(case.dy, case.x, block, case.geometry))
    check_norms(case, eager.linear.block_norms(case.dy, case.x, *all_cells(case), block, case.geometry))


@pytest.mark.parametrize("tile", [1, 2, 8, 9, 12, 1000])
@pytest.mark.parametrize("block", [(1, 1), (4, 4), (5, 2)])
def test_tiles_meet_without_gap_or_overlap(block: tuple[int, int], tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "TILE", tile)
    for seed in range(4):
        case = random_case(seed, block=block, tokens=9, dtype=torch.float32)
        check_norms(case, eager.linear.all_block_norms(case.dy, case.x, block, case.geometry))


@pytest.mark.parametrize("dy_layout", DY_LAYOUTS)
def test_norms_of_any_strides(dy_layout: str) -> None:
    case = edge_case(dy_layout=dy_layout)

    check_norms(case, eager.linear.all_block_norms(case.dy, case.x, (4, 3), case.geometry))
    check_norms(case, eager.linear.block_norms(case.dy, case.x, *all_cells(case), (4, 3), case.geometry))


def test_norms_of_no_tokens_are_zero() -> None:
    case = edge_case(tokens=0)

    assert eager.linear.all_block_norms(case.dy, case.x, (4, 3), case.geometry).tolist() == [[0.0] * 4] * 3
    assert eager.linear.block_norms(case.dy, case.x, *all_cells(case), (4, 3), case.geometry).tolist() == [0.0] * 12


def test_norms_of_no_blocks() -> None:
    case = edge_case()

    assert eager.linear.block_norms(case.dy, case.x, ints(), ints(), (4, 3), case.geometry).shape == (0,)


def test_norms_of_half_precision_do_not_overflow() -> None:
    """300 * 300 is beyond float16; the gradient is 90000 and so is its norm."""
    big = torch.full((1, 1), 300.0).half()

    assert eager.linear.all_block_norms(big, big, (1, 1), LinearShape(big.shape[-1], big.shape[-1])).item() == 90_000
    assert (
        eager.linear.block_norms(big, big, ints(0), ints(0), (1, 1), LinearShape(big.shape[-1], big.shape[-1])).item()
        == 90_000
    )


# Sketches.


def test_sketch_by_hand() -> None:
    """The ``G`` of the norms by hand, between ``u = 1 -1 | 2`` and ``v = 1 1 | 3``."""
    dy, x = torch.eye(3), torch.tensor([[3.0, 4, 0], [0, 0, 2], [6, 8, 1]])
    u, v = torch.tensor([[1.0, -1, 2]]), torch.tensor([[1.0, 1, 3]])

    assert eager.linear.sketch(dy, x, u, v, (2, 2), LinearShape(x.shape[-1], dy.shape[-1])).tolist() == [
        [[7, -6], [28, 6]]
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [(1, 1), (4, 4), (3, 7), (16, 8), (64, 64)])
def test_sketch_of_any_block_and_dtype(block: tuple[int, int], dtype: torch.dtype) -> None:
    case = random_case(22, block=block, dtype=dtype, tokens=19)
    u, v = signs(3, case.grid.out_features, 0), signs(3, case.grid.in_features, 1)

    check_sketch(case, eager.linear.sketch(case.dy, case.x, u, v, block, case.geometry), u, v)


def test_sketches_of_micro_batches_add_up() -> None:
    case = edge_case(tokens=33)
    u, v = signs(5, 11, 0), signs(5, 10, 1)

    parts = [
        eager.linear.sketch(case.dy[t : t + 8], case.x[t : t + 8], u, v, (4, 3), case.geometry) for t in range(0, 33, 8)
    ]

    check_sketch(case, torch.stack(parts).sum(0), u, v)


def test_the_mean_of_squares_estimates_the_squared_norm() -> None:
    """Each square has a relative deviation of at most sqrt(8), so the mean of r = 3200 has one of at most 0.05.

    The largest of 12 blocks stays within 5 deviations but for one seed in 100 000; the seed is fixed.
    """
    case = edge_case(tokens=33)
    pairs = 3200
    u, v = signs(pairs, 11, 2), signs(pairs, 10, 3)

    estimate = eager.linear.sketch(case.dy, case.x, u, v, (4, 3), case.geometry).square().mean(0)
    squared = eager.linear.all_block_norms(case.dy, case.x, (4, 3), case.geometry).square()

    assert float((estimate / squared - 1).abs().max()) < 5 * (8 / pairs) ** 0.5


def test_a_sketch_of_no_tokens_is_zero() -> None:
    case = edge_case(tokens=0)

    assert not eager.linear.sketch(case.dy, case.x, signs(2, 11, 0), signs(2, 10, 1), (4, 3), case.geometry).any()


# Both.


@pytest.mark.parametrize("scratch", [1, 2000, 50_000])
def test_scores_do_not_depend_on_the_scratch(scratch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "SCRATCH_BYTES", scratch)
    for block in ((1, 1), (4, 3)):
        case = random_case(2, block=block, tokens=33, dtype=torch.float32)
        u, v = signs(3, case.grid.out_features, 0), signs(3, case.grid.in_features, 1)

        check_norms(case, eager.linear.all_block_norms(case.dy, case.x, block, case.geometry))
        check_norms(case, eager.linear.block_norms(case.dy, case.x, *all_cells(case), block, case.geometry))
        check_sketch(case, eager.linear.sketch(case.dy, case.x, u, v, block, case.geometry), u, v)


@pytest.mark.parametrize("which", ["dy", "x"])
def test_a_nan_reaches_only_the_blocks_that_it_belongs_to(which: str) -> None:
    """In dy a block row, in x a block column; also in the last one, which is filled up with zeros."""
    case = edge_case()
    u, v = signs(2, 11, 0), signs(2, 10, 1)
    for block in range(3):
        broken = {"dy": case.dy.clone(), "x": case.x.clone()}
        broken[which][3, block * case.grid.block[which == "x"]] = NAN
        expected = torch.zeros(3, 4, dtype=torch.bool)
        expected.select(int(which == "x"), block).fill_(True)
        case_now = replace(case, **broken)

        norms = eager.linear.all_block_norms(
            case_now.dy, case_now.x, (4, 3), LinearShape(case_now.x.shape[-1], case_now.dy.shape[-1])
        )
        chosen = eager.linear.block_norms(
            case_now.dy, case_now.x, *all_cells(case), (4, 3), LinearShape(case_now.x.shape[-1], case_now.dy.shape[-1])
        )
        sketch = eager.linear.sketch(
            case_now.dy, case_now.x, u, v, (4, 3), LinearShape(case_now.x.shape[-1], case_now.dy.shape[-1])
        )

        assert torch.equal(norms.isnan(), expected)
        assert torch.equal(chosen.view(3, 4).isnan(), expected)
        assert torch.equal(sketch.isnan(), expected.expand(2, 3, 4))


def test_two_calls_agree_to_the_bit() -> None:
    case = edge_case(tokens=33, dtype=torch.bfloat16)
    u, v = signs(2, 11, 0), signs(2, 10, 1)

    for score in (
        lambda: eager.linear.all_block_norms(case.dy, case.x, (4, 3), case.geometry),
        lambda: eager.linear.block_norms(case.dy, case.x, *all_cells(case), (4, 3), case.geometry),
        lambda: eager.linear.sketch(case.dy, case.x, u, v, (4, 3), case.geometry),
    ):
        assert torch.equal(score(), score())


def test_the_norms_of_all_blocks_never_hold_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile is at most a quarter of G; here G is 1024 x 1024 and a tile 256 x 256."""
    made: list[int] = []
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, **k: made.append((t := zeros(*a, **k)).numel()) or t)
    dy = x = torch.ones(2, 1024)

    eager.linear.all_block_norms(dy, x, (16, 16), LinearShape(x.shape[-1], dy.shape[-1]))

    assert max(made) == 256 * 256
