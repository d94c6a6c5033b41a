"""The cases of ``python -m bench.race --quick`` for pytest-benchmark, to keep and compare runs on one machine.

    pytest bench/bench_linear.py --benchmark-save=before
    pytest bench/bench_linear.py --benchmark-compare

One group a case, one benchmark a contestant. Here the contestants run one after the other: a machine that gets busy in
between favours some. For a comparison with other libraries there is the race, in which they take turns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.cpu.cases import Case, quick_cases
from bench.cpu.results import AnyCase
from bench.cpu.run import answers, makers, tensors
from bench.gpu.contestants import OURS
from bench.gpu.peers import NotSupported

CONTESTANTS = [(case, name) for case in quick_cases() for name in makers(case)]


@pytest.mark.parametrize(("case", "name"), CONTESTANTS, ids=[f"{case.key} {name}" for case, name in CONTESTANTS])
def test_linear(benchmark: Any, case: Case, name: str) -> None:
    """Check the answer of one contestant, then time it."""
    time_one(benchmark, case, name)


def time_one(benchmark: Any, case: AnyCase, name: str) -> None:
    """Give one contestant of a case to the fixture of pytest-benchmark."""
    run = checked(case, name)
    threads = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        benchmark.group = case.key
        benchmark(run)
    finally:
        torch.set_num_threads(threads)


def checked(case: AnyCase, name: str) -> Callable[[], object]:
    """Return what is to be timed, if its answer is right."""
    try:
        contestant = makers(case)[name](tensors(case.scene), case.op)
    except NotSupported as error:
        pytest.skip(str(error))
    wrong = answers(case.scene).wrong(contestant.answer(contestant.run()), by_element=contestant.kind == OURS)
    assert wrong is None, wrong
    return contestant.run
