"""When, and what fraction."""

from __future__ import annotations

import pytest

from sparsekern.training import Schedule


def test_due_steps():
    def due(**options) -> list[int]:
        schedule = Schedule(**({"update_every": 3, "start": 0, "stop": None, "drop_fraction": 0.3} | options))
        return [step for step in range(14) if schedule.due(step)]

    assert due() == [3, 6, 9, 12]
    assert due(start=6) == [6, 9, 12]
    assert due(start=7, stop=12) == [9]
    assert due(stop=0) == []
    assert due(update_every=1, stop=3) == [1, 2]


def test_due_since():
    schedule = Schedule(3, 0, 8, 0.3)
    assert [schedule.due_since(seen, 7) for seen in range(8)] == [True] * 6 + [False] * 2  # 3 and 6 are due
    assert not schedule.due_since(0, 2) and not schedule.due_since(6, 6)
    assert not schedule.due_since(0, 8), "not at stop, even for what was due before"


def test_the_cosine_by_hand():
    schedule = Schedule(1, 0, 100, 0.4)
    # 0.4 / 2 * (1 + cos(pi t / 100))
    assert [round(schedule.fraction(t), 6) for t in (0, 25, 50, 75, 100, 200)] == [
        0.4,
        round(0.2 * (1 + 2**-0.5), 6),
        0.2,
        round(0.2 * (1 - 2**-0.5), 6),
        0.0,
        0.0,
    ]


def test_without_an_end_the_fraction_stays():
    assert {Schedule(1, 0, None, 0.4).fraction(t) for t in (0, 10, 10**6)} == {0.4}


def test_a_function_of_the_step():
    schedule = Schedule(1, 0, 100, lambda step: step / 10)
    assert schedule.fraction(3) == 0.3
    with pytest.raises(ValueError, match=r"drop_fraction is 1.1; it must be in \[0, 1\]"):
        schedule.fraction(11)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(update_every=0), "update_every is 0; it must be 1 or more optimizer steps"),
        (dict(start=-1), "start is -1; it must be 0 or more"),
        (dict(start=5, stop=4), "stop is 4, before start = 5"),
        (dict(drop_fraction=1.5), r"drop_fraction is 1.5; it must be in \[0, 1\]"),
        (dict(drop_fraction=-0.1), "drop_fraction is -0.1"),
    ],
)
def test_errors(options, text):
    with pytest.raises(ValueError, match=text):
        Schedule(**({"update_every": 1, "start": 0, "stop": None, "drop_fraction": 0.3} | options))


def test_the_cosine_alone():
    schedule = Schedule(1, 0, 100, 0.0)
    assert [round(schedule.cosine(t), 6) for t in (0, 50, 100, 101)] == [1, 0.5, 0, 0]
    assert Schedule(1, 0, None, 0.3).cosine(10**6) == 1 and Schedule(1, 0, 0, 0.3).cosine(0) == 0
