"""What the convolution's kernels are to reach: times as fast as oneDNN channels last, forward + backward, block 32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from bench.cpu.conv_cases import POINTWISE, SPARSITIES, STAGES, STRIDED, ConvCase, Shape, conv_case
from bench.cpu.results import Race
from bench.gpu.goals import verdict


class ConvGoal(NamedTuple):
    """A line of the table of goals: ``must`` and ``aim`` for each of :data:`SPARSITIES`."""

    what: str
    shapes: tuple[Shape, ...]
    must: tuple[float, ...]
    aim: tuple[float, ...]


class ConvFinding(NamedTuple):
    """A goal in one case, as :class:`bench.cpu.goals.Finding`."""

    goal: ConvGoal
    case: ConvCase
    measured: float | None
    must: float
    aim: float
    verdict: str


GOALS = (
    ConvGoal("channels_last, first stage", STAGES[:1], (1.7, 3.2, 5.5, 7), (1.9, 3.7, 7.5, 11)),
    ConvGoal("channels_last, later stages", STAGES[1:], (1.8, 3.2, 6.5, 10), (2, 3.8, 8.5, 15)),
    ConvGoal("channels_last, stride 2", (STRIDED,), (1.6, 3, 5, 7), (1.9, 3.6, 7.5, 12)),
    ConvGoal("channels_last, 1x1", (POINTWISE,), (1.8, 3.3, 6.5, 9), (2, 4, 9, 15)),
)


def conv_findings(race: Race) -> Iterator[ConvFinding]:
    """Compare what was measured with all goals, which are the same for one thread and for two."""
    for goal in GOALS:
        for shape in goal.shapes:
            for threads in (1, 2):
                for sparsity, must, aim in zip(SPARSITIES, goal.must, goal.aim, strict=True):
                    case = conv_case("step", shape, 32, sparsity, threads)
                    measured = race.ratio(case, "sparsekern", ("channels_last",))
                    said = "not measured" if measured is None else verdict(measured, must, aim)
                    yield ConvFinding(goal, case, measured, must, aim, said)
