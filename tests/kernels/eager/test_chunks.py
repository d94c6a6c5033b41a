from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparsekern.kernels.eager import chunks
from sparsekern.kernels.eager.chunks import Panel, cut, panels, piece, spans

many = st.integers(0, 10**7)
byte_counts = st.integers(0, 10**9)


def test_a_piece_fills_half_the_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "SCRATCH_BYTES", 2000)

    assert piece(50, 100) == 10  # 10 * 100 bytes are half of 2000
    assert piece(50, 99) == 10
    assert piece(50, 101) == 9
    assert piece(7, 100) == 7  # no more than there are
    assert piece(50, 0) == 50
    assert piece(50, 1001) == 1  # one is the least it can work with
    assert piece(0, 100) == 1  # a step of 0 would not be a step


@settings(deadline=None, max_examples=100, derandomize=True)
@given(many, byte_counts)
def test_pieces_stay_within_half_the_scratch_where_that_is_possible(count: int, size: int) -> None:
    found = piece(count, size)

    assert 1 <= found <= max(1, count)
    assert found * size <= chunks.SCRATCH_BYTES // 2 or found == 1
    assert found == max(1, count) or (found + 1) * size > chunks.SCRATCH_BYTES // 2  # and no smaller than needed


def test_spans() -> None:
    assert list(spans(10, 4)) == [(0, 4), (4, 8), (8, 10)]
    assert list(spans(8, 4)) == [(0, 4), (4, 8)]
    assert list(spans(3, 4)) == [(0, 3)]
    assert list(spans(0, 4)) == []


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.integers(0, 1000), st.integers(1, 1200))
def test_spans_cover_everything_once(total: int, step: int) -> None:
    covered = [i for start, stop in spans(total, step) for i in range(start, stop)]

    assert covered == list(range(total))
    assert all(0 < stop - start <= step for start, stop in spans(total, step))


def test_cut_fills_up_the_last_block_with_zeros() -> None:
    x = torch.tensor([[1.0, 2, 3, 4, 5], [6, 7, 8, 9, 10]])

    assert cut(x, 2).tolist() == [[[1, 2], [3, 4], [5, 0]], [[6, 7], [8, 9], [10, 0]]]
    assert cut(x, 8).tolist() == [[[1, 2, 3, 4, 5, 0, 0, 0]], [[6, 7, 8, 9, 10, 0, 0, 0]]]


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "expanded"])
def test_cut_makes_a_view_where_the_side_divides(layout: str) -> None:
    x = {
        "contiguous": torch.randn(3, 8),
        "transposed": torch.randn(8, 3).T,
        "expanded": torch.randn(1, 1).expand(3, 8),
    }[layout]

    assert cut(x, 4).data_ptr() == x.data_ptr()
    assert torch.equal(cut(x, 4).flatten(1), x)


def test_cut_of_no_tokens() -> None:
    assert cut(torch.empty(0, 5), 2).shape == (0, 3, 2)
    assert cut(torch.empty(0, 4), 2).shape == (0, 2, 2)


def test_panels_are_whole_images_or_rows_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the scratch is 1000 bytes; a row takes 100 and an image 200 beside."""
    monkeypatch.setattr(chunks, "SCRATCH_BYTES", 2000)

    assert list(panels(5, 3, 100, 200)) == [Panel(0, 2, 0, 3), Panel(2, 4, 0, 3), Panel(4, 5, 0, 3)]
    assert list(panels(2, 12, 100, 200)) == [Panel(n, n + 1, r, min(r + 8, 12)) for n in (0, 1) for r in (0, 8)]
    assert list(panels(1, 2, 5000, 200)) == [Panel(0, 1, 0, 1), Panel(0, 1, 1, 2)]  # one is the least
    assert list(panels(5, 2, 100, 0, most=4)) == [Panel(0, 2, 0, 2), Panel(2, 4, 0, 2), Panel(4, 5, 0, 2)]
    assert list(panels(1, 4, 100, 0, most=0)) == [Panel(0, 1, r, r + 1) for r in range(4)]
    assert list(panels(0, 4, 100, 0)) == []


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.integers(0, 9), st.integers(1, 40), st.integers(0, 10**7), st.integers(0, 10**7))
def test_panels_cover_every_row_once_in_order(images: int, rows: int, row_bytes: int, image_bytes: int) -> None:
    covered = []
    for n0, n1, r0, r1 in panels(images, rows, row_bytes, image_bytes):
        assert (r0, r1) == (0, rows) or n1 == n0 + 1
        covered += [(n, r) for n in range(n0, n1) for r in range(r0, r1)]

    assert covered == [(n, r) for n in range(images) for r in range(rows)]
