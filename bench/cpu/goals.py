"""What the kernels are to reach. They were set on an AMD EPYC of family 26, where ``F.linear`` is no AVX-512 code.

Not here: the fraction of the processor's peak on stored blocks, because no peak is measured. The table shows the rate
on stored blocks as a share of the rate of the best dense contestant instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from bench.cpu.cases import FEW_TOKENS, LARGE, WIDE, Case
from bench.cpu.results import Race
from bench.gpu.goals import verdict

SET_ON = "AMD EPYC"

DENSE = ("F.linear", "oneDNN", "nn.Linear")
F_LINEAR = ("F.linear",)

Shape = tuple[int, int, int]
Figures = dict[float, tuple[float, float]]
"""``(must, aim)`` by sparsity: times as fast as the fastest of those it is compared with."""


class Goal(NamedTuple):
    """A line of the table of goals."""

    what: str
    figures: Figures
    against: tuple[str, ...]
    op: str = "step"
    dtype: str = "fp32"
    shapes: tuple[Shape, ...] = (WIDE, LARGE)
    block: int = 32
    threads: int = 1
    contestant: str = "sparsekern"


class Finding(NamedTuple):
    """A goal in one case. ``measured`` is None, and the verdict ``not measured``, where the file does not have it."""

    goal: Goal
    case: Case
    measured: float | None
    must: float
    aim: float
    verdict: str


def _by_sparsity(must: tuple[float, ...], aim: tuple[float, ...]) -> Figures:
    return dict(zip((0.5, 0.75, 0.9, 0.95, 0.99), zip(must, aim, strict=True), strict=True))


GOALS = (
    Goal("best dense", _by_sparsity((1.9, 3.7, 8, 13.5, 25), (2.1, 4.1, 9.5, 17.5, 40)), DENSE),
    Goal("best dense", _by_sparsity((1.9, 3.5, 7, 11.5, 20), (2.1, 4, 9, 16, 32)), DENSE, threads=2),
    Goal("F.linear", _by_sparsity((4, 8, 18, 30, 55), (4.6, 9, 21, 38, 85)), F_LINEAR),
    Goal("F.linear", _by_sparsity((1.1, 2.1, 4.7, 8, 17), (1.6, 3.1, 7, 11.6, 26)), F_LINEAR, shapes=(WIDE,), block=1),
    Goal("torch BSR and CSR", {0.9: (7, 9)}, ("torch-bsr", "torch-csr"), op="fwd", shapes=(WIDE,)),
    Goal("sampled_addmm", {0.9: (4.5, 6)}, ("torch-csr", "torch-bsr"), op="dvalues", shapes=(WIDE,)),
    Goal(
        "F.linear in bf16",
        {0.5: (1.9, 2.1), 0.9: (8, 9.5), 0.95: (12, 17)},
        F_LINEAR,
        op="fwd",
        dtype="bf16",
        shapes=(WIDE,),
    ),
    Goal("F.linear in bf16", {0.9: (6, 9)}, F_LINEAR, dtype="bf16", shapes=(WIDE,)),
    Goal("F.linear, AVX2 path", {0.9: (10, 11.5)}, F_LINEAR, shapes=(WIDE,), contestant="sparsekern-avx2"),
    *(
        Goal("best dense, few tokens", {0.9: (2, 5)}, DENSE, op=op, shapes=tuple((t, *WIDE[1:]) for t in FEW_TOKENS))
        for op in ("fwd", "step")
    ),
    Goal(
        "autograd / the kernels alone",
        {sparsity: (1 / 1.07, 1 / 1.07) for sparsity in (0.5, 0.75, 0.9, 0.95, 0.99)},
        ("sparsekern",),
        contestant="SparseLinear",
    ),
)


def findings(race: Race) -> Iterator[Finding]:
    """Compare what was measured with all goals."""
    for goal in GOALS:
        for shape in goal.shapes:
            for sparsity, (must, aim) in goal.figures.items():
                case = Case(goal.op, goal.dtype, *shape, goal.block, sparsity, goal.threads)
                measured = race.ratio(case, goal.contestant, goal.against)
                said = "not measured" if measured is None else verdict(measured, must, aim)
                yield Finding(goal, case, measured, must, aim, said)
