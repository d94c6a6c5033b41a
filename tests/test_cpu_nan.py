"""NaN, infinity and what lies in phantom elements and free slots reach nothing that does not read them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from sparsekern.kernels import cpu
from sparsekern.kernels.contract import LinearShape

from sparsekern.topology import Grid, Topology, build_index
from tests.kernels.cpu.linear_calls import (
    NAN,
    backward,
    dvalues,
    dx,
    fwd,
    ints,
    small_case,
    with_block,
)

pytestmark = pytest.mark.usefixtures("instructions", "poisoned_memory")


@pytest.mark.parametrize("tokens", [7, 40])
@pytest.mark.parametrize("block", [(1, 1), (16, 32)])
def test_a_nan_in_one_token_stays_in_that_token(block: tuple[int, int], tokens: int) -> None:
    case = with_block(block, blocks=20, tokens=tokens)
    x, dy = case.x.clone(), case.dy.clone()
    x[2, :] = dy[4, :] = NAN
    broken = replace(case, x=x, dy=dy)

    assert torch.equal(fwd(broken).isnan().any(1).nonzero().flatten(), torch.tensor([2]))
    assert torch.equal(dx(broken).isnan().any(1).nonzero().flatten(), torch.tensor([4]))
    assert torch.equal(fwd(broken)[3:], fwd(case)[3:])
    assert torch.equal(dx(broken)[:4], dx(case)[:4])
    assert torch.equal(backward(broken)[0].isnan(), dx(broken).isnan())


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("side", [1, 16])
def test_a_nan_in_x_reaches_only_the_rows_that_read_it(side: int, tokens: int) -> None:
    """Block column 0 is read by block row 0 alone, block column 1 by block row 1."""
    index = build_index(Topology(Grid(2 * side, 2 * side, (side, side)), ints(0, 1), ints(0, 1)))
    values, x = torch.ones(2, side, side), torch.ones(tokens, 2 * side)
    x[:, 0] = NAN
    reached = torch.arange(2 * side) < side

    assert torch.equal(
        cpu.linear.fwd(x, values, None, index, LinearShape(x.shape[-1], 2 * side)).isnan(), reached.expand(tokens, -1)
    )
    assert torch.equal(
        cpu.linear.dx(x, values, index, LinearShape(2 * side, x.shape[-1])).isnan(), reached.expand(tokens, -1)
    )


@pytest.mark.parametrize("tokens", [7, 40])
@pytest.mark.parametrize("block", [(1, 1), (16, 32)])
def test_a_nan_in_a_free_slot_reaches_nothing(block: tuple[int, int], tokens: int) -> None:
    case = with_block(block, tokens=tokens)
    values = case.values.clone()
    values[case.row < 0] = NAN
    broken = replace(case, values=values)

    assert torch.equal(fwd(broken), fwd(case))
    assert torch.equal(dx(broken), dx(case))


@pytest.mark.parametrize("tokens", [7, 40])
def test_what_the_phantom_part_holds_changes_nothing(tokens: int) -> None:
    """The contract asks that it be finite; layers keep it at zero."""
    case = small_case(blocks=20, tokens=tokens)
    values = case.values.clone()
    values[case.row == 4, 6:, :] = 1e30  # 70 = 4 * 16 + 6
    values[case.col == 3, :, 29:] = -1e30  # 125 = 3 * 32 + 29
    broken = replace(case, values=values)

    assert torch.equal(fwd(broken), fwd(case))
    assert torch.equal(dx(broken), dx(case))


@pytest.mark.parametrize("poisoned", ["dy", "x", "both"])
@pytest.mark.parametrize("number", [NAN, float("inf")])
@pytest.mark.parametrize("count", [1, 3])
def test_dvalues_of_phantom_elements_and_free_slots_are_zero_whatever_dy_and_x_hold(
    poisoned: str, number: float, count: int, threads: Callable[[int], None]
) -> None:
    threads(count)
    case = small_case(blocks=20, tokens=300)
    if poisoned in ("dy", "both"):
        case = replace(case, dy=torch.full_like(case.dy, number))
    if poisoned in ("x", "both"):
        case = replace(case, x=torch.full_like(case.x, number))

    for grad in (dvalues(case), backward(case)[1]):
        assert not grad[case.row < 0].any()
        assert not grad[case.row == 4, 6:, :].any()
        assert not grad[case.col == 3, :, 29:].any()
        assert grad[(case.row == 0) & (case.col == 0)].isfinite().logical_not().all()
