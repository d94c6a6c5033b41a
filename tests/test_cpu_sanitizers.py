"""The native CPU kernels read and write nothing that is not theirs, and do nothing that C++ leaves undefined."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import sanitize_cpu

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(not sanitize_cpu.runtimes(), reason="the compiler has no libasan.so and libubsan.so")
def test_a_sweep_of_shapes_under_the_sanitizers() -> None:
    command = [sys.executable, str(ROOT / "tests" / "sanitize_cpu.py"), "12"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)

    assert done.returncode == 0, done.stderr[-6000:]
    assert "no report of the sanitizers" in done.stdout
    print(done.stdout)  # the counts, under pytest -s
