"""Checks that never fail check nothing: here real functions are broken one at a time, and a check must turn red.

Each mutation replaces one function of the package by a broken version of itself; the checks are those that the other
tests use. Every test first runs the same check on the healthy code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from sparsekern.kernels import eager
from sparsekern.kernels.contract import Index
from sparsekern.kernels.eager import chunks, products
from torch import Tensor

from sparsekern.topology import Topology, mask_index
from sparsekern.topology import index as index_module
from tests.kernels.calls import AnyCase, Calls
from tests.oracle import (
    GARBAGE,
    Case,
    check_dvalues,
    check_dx,
    check_kernels,
    check_op,
    check_y,
    dense_weight,
    random_case,
    stored_blocks,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

Mutate = Callable[..., None]
calls = Calls(eager)


@pytest.fixture
def case() -> Case:
    """4 x 4 blocks of 4 x 4 with an edge on both sides; 10 stored, 2 free slots between them; 11 tokens."""
    return random_case(
        4,
        **{"block": (4, 4), "rows": 4, "cols": 4, "out_features": 14, "in_features": 15, "blocks": 10, "free": 2},
        **{"tokens": 11, "dtype": torch.float32, "bias": True, "x_layout": "contiguous", "dy_layout": "contiguous"},
    )


@pytest.fixture
def mutate(monkeypatch: pytest.MonkeyPatch) -> Mutate:
    """Replace ``owner.name`` by ``mutation(healthy, *args, **kwargs)``."""

    def apply(owner: Any, name: str, mutation: Callable[..., Any]) -> None:
        healthy = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: mutation(healthy, *args, **kwargs))

    return apply


def y_is_right(case: AnyCase) -> None:
    check_y(case, calls.fwd(case))


def dx_is_right(case: AnyCase) -> None:
    check_dx(case, calls.dx(case))


def dvalues_are_right(case: AnyCase) -> None:
    check_dvalues(case, calls.dvalues(case, torch.float32), torch.float32)


def both_agree(case: Case) -> None:
    check_kernels(eager, case)
    check_op(case)


def assert_red(check: Callable[[AnyCase], None], case: AnyCase, message: str = "") -> None:
    """The check that fails is the oracle's own comparison: it says what is wrong and where."""
    with pytest.raises(AssertionError, match=message or r"(y|dx|dvalues)\[.*\] is .*, not .* elements are wrong"):
        check(case)


def test_the_oracle_by_hand() -> None:
    """Blocks of 2 x 2 in a matrix of 3 x 3, one in the corner that sticks out; the free slot is nowhere."""
    row = col = torch.tensor([1, -1, 0], dtype=torch.int32)
    values = torch.arange(12.0).view(3, 2, 2)

    weight = dense_weight(values, row, col, 3, 3)
    blocks = stored_blocks(weight, row, col, (2, 2))

    assert weight.tolist() == [[8, 9, 0], [10, 11, 0], [0, 0, 0]]
    assert blocks.tolist() == [[[0, 0], [0, 0]], [[0, 0], [0, 0]], [[8, 9], [10, 11]]]


def test_healthy_code_passes(case: Case) -> None:
    """The control. The case has all that the mutations need: an edge, free slots, slots out of order."""
    both_agree(case)

    assert case.grid.has_edge
    assert bool((case.row < 0).any()) and int(case.row[-1]) >= 0
    assert case.index.row_slot[:12].tolist() != sorted(case.index.row_slot[:12].tolist())
    assert bool((case.row == 3).any()) and bool((case.col == 3).any())


@pytest.mark.parametrize("factor", [1 + 1e-5, 1 - 1e-5])
def test_an_error_in_the_sixth_digit_is_seen(case: Case, factor: float) -> None:
    """The tolerance is not so wide that it hides anything."""
    y = calls.fwd(case)
    check_y(case, y)

    with pytest.raises(AssertionError):
        check_y(case, y * factor)


@pytest.mark.parametrize("check", [y_is_right, dx_is_right])
def test_block_transposed(case: Case, mutate: Mutate, check: Callable[[Case], None]) -> None:
    check(case)
    mutate(
        eager.linear,
        "multiply",
        lambda healthy, x, values, *rest, **kw: healthy(x, values.transpose(1, 2), *rest, **kw),
    )
    assert_red(check, case)


def test_block_of_the_gradient_transposed(case: Case, mutate: Mutate) -> None:
    dvalues_are_right(case)

    def transposed(healthy: Any, *args: Any) -> Iterator[tuple[int, int, Tensor]]:
        for start, stop, part in healthy(*args):
            yield start, stop, part.transpose(1, 2).clone()

    mutate(eager.linear, "outer_blocks", transposed)
    assert_red(dvalues_are_right, case)


def mutate_index(mutate: Mutate, change: Callable[[Index, Topology], None]) -> None:
    """Let every index be built right and then changed."""

    def rebuild_(healthy: Any, index: Index, topology: Topology, **how: bool) -> None:
        healthy(index, topology, **how)
        change(index, topology)

    mutate(index_module, "rebuild_", rebuild_)


@pytest.mark.parametrize(
    ("order", "check"),
    [("row_slot", y_is_right), ("row_slot", dvalues_are_right), ("col_slot", dx_is_right), ("row_slot", check_op)],
)
def test_slots_read_in_the_order_of_the_entries(
    case: Case, mutate: Mutate, order: str, check: Callable[[Case], None]
) -> None:
    check(case)
    mutate_index(mutate, lambda index, topology: getattr(index, order)[:12].copy_(torch.arange(12)))
    assert_red(check, case)


@pytest.mark.parametrize(
    ("other", "place", "check"),
    [("row_col", "col", y_is_right), ("row_col", "col", dvalues_are_right), ("col_row", "row", dx_is_right)],
)
def test_the_other_coordinate_not_put_in_order(
    case: Case, mutate: Mutate, other: str, place: str, check: Callable[[Case], None]
) -> None:
    """Block columns in the order of the slots, beside slots in the order of the entries."""
    check(case)
    mutate_index(
        mutate,
        lambda index, topology: getattr(index, other)[:12].copy_(getattr(topology, place).clamp(min=0)),
    )
    assert_red(check, case)


@pytest.mark.parametrize("check", [y_is_right, dvalues_are_right, check_op])
def test_two_rows_of_the_index_swapped(case: Case, mutate: Mutate, check: Callable[[Case], None]) -> None:
    check(case)

    def swap(index: Index, topology: Topology) -> None:
        other = torch.tensor([1, 0, 2, 3, -1], dtype=torch.int32)[topology.row.long()]
        swapped = index_module.empty_index(topology)
        healthy(swapped, Topology(topology.grid, other, topology.col))
        for tensor, wrong in zip(index[:3], swapped[:3], strict=True):
            tensor.copy_(wrong)

    healthy = index_module.rebuild_
    mutate_index(mutate, swap)
    assert_red(check, case)


def test_a_pointer_off_by_one(case: Case, mutate: Mutate) -> None:
    """The first block of block row 2 is counted to block row 1."""
    y_is_right(case)
    mutate_index(mutate, lambda index, topology: index.row_ptr[2].add_(1))
    assert_red(y_is_right, case)


def test_phantom_elements_written(case: Case, mutate: Mutate) -> None:
    dvalues_are_right(case)
    mutate(eager.linear, "outer_blocks", garbage_in_phantom)
    assert_red(dvalues_are_right, case, r"dvalues\[.*\] is 1000.0, not 0.0 \+- 0;")


def garbage_in_phantom(healthy: Any, dy: Tensor, x: Tensor, places: Any, *rest: Any) -> Any:
    for start, stop, part in healthy(dy, x, places, *rest):
        part[places(start, stop)[0] == 3, 14 - 3 * 4 :] = GARBAGE
        yield start, stop, part


def test_phantom_elements_not_cleared_where_a_nan_meets_the_filling(case: Case, mutate: Mutate) -> None:
    """Without NaN the filling keeps them zero by itself."""
    mutate(eager.linear, "clear_phantom", lambda healthy, *args, **kwargs: None)
    dvalues_are_right(case)

    broken = replace(case, x=case.x.clone().fill_(float("nan")))
    grad = calls.dvalues(broken, torch.float32)
    with pytest.raises(AssertionError):
        assert_phantom_is_zero(broken, grad)


def assert_phantom_is_zero(case: Case, grad: Tensor) -> None:
    assert not grad[case.row == 3, 14 - 3 * 4 :].any()


@pytest.mark.parametrize("check", [y_is_right, dx_is_right])
def test_a_free_slot_multiplied(case: Case, mutate: Mutate, check: Callable[[Case], None]) -> None:
    """What it holds is added to the last block row (block column)."""
    check(case)
    mutate(eager.linear, "entry_owners", lambda healthy, ptr, *span: healthy(ptr, *span).clamp(max=ptr.shape[0] - 2))
    assert_red(check, case)


def test_a_free_slot_given_a_gradient(case: Case, mutate: Mutate) -> None:
    dvalues_are_right(case)
    mutate(products, "entry_owners", lambda healthy, ptr, *span: healthy(ptr, *span).clamp(max=ptr.shape[0] - 2))
    assert_red(dvalues_are_right, case, r"dvalues\[.*\] is .*, not 0.0 \+- 0;")


@pytest.mark.parametrize("check", [dx_is_right, check_op])
def test_dx_by_the_row_lists(case: Case, mutate: Mutate, check: Callable[[Case], None]) -> None:
    check(case)
    mutate(
        eager.linear,
        "dx",
        lambda healthy, dy, values, index, *rest: healthy(
            dy,
            values,
            Index(*index[:3], col_ptr=index.row_ptr, col_row=index.row_col, col_slot=index.row_slot),
            *rest,
        ),
    )
    assert_red(check, case)


@pytest.mark.parametrize("check", [y_is_right, check_op])
def test_the_bias_dropped_in_the_edge_row(case: Case, mutate: Mutate, check: Callable[[Case], None]) -> None:
    check(case)

    def start(healthy: Any, bias: Tensor, groups: int, rows: int, *rest: Any) -> Tensor:
        total: Tensor = healthy(bias, groups, rows, *rest)
        if bias is not None:
            total[rows - 1] = 0
        return total

    mutate(eager.linear, "start_sums", start)
    assert_red(check, case)


@pytest.mark.parametrize("check", [y_is_right, dx_is_right, dvalues_are_right])
def test_the_last_token_of_a_panel_dropped(
    case: Case, mutate: Mutate, check: Callable[[Case], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several panels; the 12 slots are still covered. In y the token is never written: the poison is seen."""
    monkeypatch.setattr(chunks, "SCRATCH_BYTES", 1000)
    check(case)

    def spans(healthy: Any, total: int, step: int) -> Iterator[tuple[int, int]]:
        panels = list(healthy(total, step))
        if total == 11:
            assert len(panels) > 1
            (start, stop), *others = panels
            panels = [(start, stop - 1), *others]
        yield from panels

    mutate(eager.linear, "spans", spans)
    assert_red(check, case)


@pytest.mark.parametrize("check", [y_is_right, dx_is_right, dvalues_are_right])
def test_a_chunk_of_blocks_dropped(
    case: Case, mutate: Mutate, check: Callable[[Case], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "SCRATCH_BYTES", 3000)
    check(case)
    mutate(
        eager.linear,
        "spans",
        lambda healthy, total, step: [*healthy(total, step)][1 if total == 12 and step < 12 else 0 :],
    )
    assert_red(check, case)


def test_sums_formed_in_half_precision(mutate: Mutate) -> None:
    """Rounding after every block; 64 blocks a row are enough to see it above the rounding of a bfloat16 output."""
    case = random_case(
        0, block=(4, 4), rows=2, cols=64, blocks=128, free=0, tokens=33, dtype=torch.bfloat16, dy_layout="contiguous"
    )
    y_is_right(case)
    mutate(eager.linear, "accumulate_dtype", lambda healthy, dtype: dtype)
    assert_red(y_is_right, case)


def test_a_mask_that_lets_free_slots_in(case: Case, mutate: Mutate) -> None:
    """The mask names them, and the end of the used entries is not looked at."""
    keep = torch.ones(12, dtype=torch.bool)

    def masked_y_is_right(case: Case) -> None:
        index = mask_index(case.index, keep, (4, 4))
        check_y(case, calls.fwd(case, index))

    masked_y_is_right(case)

    def compact(healthy: Any, into: Any, order: tuple[Tensor, ...], *rest: Any) -> Any:
        ptr, *others = order
        return healthy(into, (torch.cat([ptr[:-1], ptr.new_tensor([12])]), *others), *rest)

    mutate(index_module, "_compact_", compact)
    assert_red(masked_y_is_right, case)
