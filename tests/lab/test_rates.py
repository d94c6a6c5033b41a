import math

import pytest

from sparsekern.lab.rates import Constant, Cosine, Milestones


def factors(schedule, steps):
    return [schedule.factor(step, steps) for step in range(steps)]


def test_constant():
    assert factors(Constant(), 3) == [1, 1, 1]


def test_cosine_by_hand():
    assert factors(Cosine(), 4) == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2])
    # two steps of warm-up, then a cosine of four
    expected = [0.5, 1, 1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]
    assert factors(Cosine(warm_up=1 / 3), 6) == pytest.approx(expected)


def test_milestones_by_hand():
    assert factors(Milestones((0.5, 0.75), 0.1), 8) == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])
    assert factors(Milestones((0.5,), 0.2, warm_up=0.3), 10) == pytest.approx([1 / 3, 2 / 3, 1, 1, 1] + 5 * [0.2])


@pytest.mark.parametrize("schedule", [Cosine(warm_up=0.05), Milestones((0.3, 0.7, 0.9), 0.1, warm_up=0.05)])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_training_of_few_steps(schedule, steps):
    assert all(0 < factor <= 1 for factor in factors(schedule, steps))
