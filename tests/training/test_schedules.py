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
    assert due(offset=1) == [1, 4, 7, 10, 13] and due(offset=4) == [4, 7, 10, 13]
    assert due(offset=1, start=3, stop=10) == [4, 7, 10], "as if the steps were counted from 0"


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


def test_the_cosine_begins_at_the_start():
    """0.4 / 2 * (1 + cos(pi (t - 60) / 40)): with ``start`` it would otherwise begin at 0.14."""
    schedule = Schedule(1, 60, 100, 0.4)
    values = {0: 0.4, 60: 0.4, 70: 0.2 * (1 + 2**-0.5), 80: 0.2, 90: 0.2 * (1 - 2**-0.5), 100: 0}
    assert {t: schedule.fraction(t) for t in values} == pytest.approx(values)
    later = Schedule(1, 60, 100, 0.4, offset=3)
    assert [later.fraction(t + 3) for t in values] == [schedule.fraction(t) for t in values]
    assert later.before_stop(102) and not later.before_stop(103)


def test_without_an_end_the_fraction_stays():
    assert {Schedule(1, 0, None, 0.4).fraction(t) for t in (0, 10, 10**6)} == {0.4}


def test_a_constant_fraction():
    schedule = Schedule(10, 0, 100, 0.4, "constant")
    assert {schedule.fraction(t) for t in (0, 10, 99)} == {0.4} and not schedule.due(100) and schedule.due(90)


def test_a_function_of_the_step():
    schedule = Schedule(1, 0, 100, lambda step: step / 10)
    assert schedule.fraction(3) == 0.3
    with pytest.raises(ValueError, match=r"drop_fraction is 1.1; it must be in \[0, 1\]"):
        schedule.fraction(11)


@pytest.mark.parametrize("name", ["update_every", "start", "offset"])
def test_steps_that_are_not_whole(name):
    with pytest.raises(TypeError, match=f"{name} is 1.5; it must be a whole number"):
        Schedule(**({"update_every": 1, "start": 0, "stop": None, "drop_fraction": 0.3} | {name: 1.5}))


def test_the_cosine_alone():
    schedule = Schedule(1, 0, 100, 0.0)
    assert [round(schedule.cosine(t), 6) for t in (0, 50, 100, 101)] == [1, 0.5, 0, 0]
    assert Schedule(1, 0, None, 0.3).cosine(10**6) == 1 and Schedule(1, 0, 0, 0.3).cosine(0) == 0
