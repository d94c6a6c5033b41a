"""The cases of ``python -m bench.race --kernel conv2d --quick`` for pytest-benchmark; see :mod:`bench.bench_linear`.

pytest bench/bench_conv2d.py --benchmark-save=before
pytest bench/bench_conv2d.py --benchmark-compare
"""

from __future__ import annotations

from typing import Any

import pytest

from bench.bench_linear import time_one
from bench.cpu.conv_cases import ConvCase, quick_conv_cases
from bench.cpu.run import makers

CONTESTANTS = [(case, name) for case in quick_conv_cases() for name in makers(case)]


@pytest.mark.parametrize(("case", "name"), CONTESTANTS, ids=[f"{case.key} {name}" for case, name in CONTESTANTS])
def test_conv2d(benchmark: Any, case: ConvCase, name: str) -> None:
    """Check the answer of one contestant, then time it."""
    time_one(benchmark, case, name)
