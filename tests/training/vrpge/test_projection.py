"""The projection against a table, against its own definition, and against conditions of optimality."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekern.training.vrpge import budget as module
from sparsekern.training.vrpge.budget import PROJECTIONS, project
from tests.memory import allocations


def exact(wanted: list[float], costs: list[float], budget: float, floor: float) -> list[float]:
    """Try every piece between two breakpoints, one after the other, in Python's floats."""

    def at(v: float) -> list[float]:
        return [min(1.0, max(floor, z - v * c)) for z, c in zip(wanted, costs, strict=True)]

    def spent(v: float) -> float:
        return sum(c * s for c, s in zip(costs, at(v), strict=True))

    if spent(0.0) <= budget:
        return at(0.0)
    breaks = sorted({0.0, *(max(0.0, (z - e) / c) for z, c in zip(wanted, costs, strict=True) for e in (1.0, floor))})
    for start, end in itertools.pairwise(breaks):
        if spent(end) <= budget <= spent(start):
            share = 0.0 if spent(start) == spent(end) else (spent(start) - budget) / (spent(start) - spent(end))
            return at(start + share * (end - start))
    return at(breaks[-1])


@pytest.mark.parametrize("how", PROJECTIONS)
@pytest.mark.parametrize(
    ("wanted", "costs", "budget", "floor", "expected"),
    [
        ([0.2, 0.3], [1, 1], 1.0, 0, [0.2, 0.3]),  # inside: stays
        ([1.5, -0.5], [1, 1], 1.0, 0, [1.0, 0.0]),  # clipped is enough
        ([0.9, 0.7, 0.2], [1, 1, 1], 1.2, 0, [0.7, 0.5, 0.0]),  # v = 0.2
        ([1.5, 0.8, 0.1], [1, 1, 1], 1.5, 0, [1.0, 0.5, 0.0]),  # v = 0.3: the first stays above 1
        ([0.8, 0.8], [1, 2], 1.4, 0, [0.6, 0.4]),  # v = 0.2: the dear one loses twice as much
        ([0.9, 0.5, 0.1], [1, 1, 1], 0.9, 0.1, [0.6, 0.2, 0.1]),  # v = 0.3, the last at the floor
    ],
)
def test_by_hand(how, wanted, costs, budget, floor, expected):
    found = project(torch.tensor(wanted, dtype=torch.float64), torch.tensor(costs), budget, floor, how)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)


def test_steps_that_would_run_in_a_circle(monkeypatch):
    """From 0.1875 Newton's step goes to 2.6875, and back: the budget was exceeded by as much again."""
    monkeypatch.setattr(module, "CHUNK", 1)
    z = torch.tensor([2.0, 2.0, 3.0, 0.5], dtype=torch.float64)
    found = project(z, torch.tensor([3.0, 1.0, 1.0, 1.0]), 2.8125, 0.0, "sort")
    expected = torch.tensor([(2.8125 - 2) / 3, 1.0, 1.0, 0.0], dtype=torch.float64)  # v * 3 = 2 - 0.2708...
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


number = st.floats(-2, 3, allow_nan=False, width=32)


@settings(deadline=None, max_examples=300, derandomize=True)
@given(st.sampled_from([1, 4, 2**16]), st.data())
def test_it_is_the_exact_one_and_is_so_again(chunk, data):
    """Of many units too, of which some are looked at after the other: all of them, as long as they are no more."""
    count = data.draw(st.integers(1, 12))
    wanted = data.draw(st.lists(number, min_size=count, max_size=count))
    costs = data.draw(st.lists(st.sampled_from([0.25, 1.0, 1.0, 3.0]), min_size=count, max_size=count))
    floor = data.draw(st.sampled_from([0.0, 0.05]))
    budget = sum(costs) * data.draw(st.floats(0.06, 1.0))
    expected = torch.tensor(exact(wanted, costs, budget, floor), dtype=torch.float64)
    for how in PROJECTIONS:
        z, c = torch.tensor(wanted, dtype=torch.float64), torch.tensor(costs)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "CHUNK", chunk)
            found = project(z, c, budget, floor, how)
            again = project(found, c, budget, floor, how)
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)
        assert float((c * found).sum()) <= budget + 1e-9 and found.min() >= floor and found.max() <= 1
        torch.testing.assert_close(again, found, atol=1e-9, rtol=0)


@pytest.mark.parametrize("how", PROJECTIONS)
def test_many_units_take_what_is_returned_and_little_more(how, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 2**8)
    monkeypatch.setattr(module, "HALVINGS", 20)
    z, c = torch.rand(2**14, generator=torch.Generator().manual_seed(0)), torch.ones(2**14, dtype=torch.float64)
    found = allocations(lambda: project(z, c, 2.0**12, 0.0, how))
    assert found.peak < 4 * 2**14 + 2**15 and found.largest == 4 * 2**14


@pytest.mark.parametrize("how", PROJECTIONS)
def test_no_feasible_point_is_nearer(how):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(50, generator=generator, dtype=torch.float64)
    c = torch.rand(50, generator=generator, dtype=torch.float64) + 0.1
    assert (c * z.clamp(0, 1)).sum() > 4, "the budget binds"
    found = project(z, c, 4.0, 0.0, how)
    assert float((c * found).sum()) <= 4 + 1e-9 and 0 <= found.min() <= found.max() <= 1
    for number in range(200):
        other = torch.rand(50, generator=generator, dtype=torch.float64)
        other = other if number % 2 else (found + (other - 0.5) / 10).clamp(0, 1)  # far away, and near
        other *= (4.0 / (c * other).sum()).clamp(max=1)
        # for a convex set: nearest exactly where no feasible direction goes towards what is wanted
        assert float((z - found) @ (other - found)) <= 1e-9


@pytest.mark.parametrize("how", PROJECTIONS)
def test_many_in_single_precision_keep_the_budget(how):
    z = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    found = project(z, torch.ones(20_000), 4000.0, how=how)
    assert found.dtype == torch.float32
    assert float(found.double().sum()) == pytest.approx(4000, rel=1e-6)


def test_few_halvings_stay_within_the_budget(monkeypatch):
    monkeypatch.setattr(module, "HALVINGS", 5)
    z = torch.rand(100, generator=torch.Generator().manual_seed(0)).double()
    rough = project(z, torch.ones(100), 20.0, 0.0, "bisection")
    assert 15 < float(rough.sum()) <= 20


def test_nothing_to_project():
    assert project(torch.zeros(0), torch.zeros(0), 1.0).shape == (0,)


def test_an_unknown_way():
    with pytest.raises(ValueError, match="projection is 'newton'; it must be one of sort, bisection"):
        project(torch.ones(1), torch.ones(1), 1.0, how="newton")
