"""A cheap sample of ``make soak``: a few kills of each method, a few damaged files for each reader."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the harness forks")
def test_killed_runs_end_like_those_left_alone():
    out = run("tests.soak.kills", "--kills", "5")
    assert " 5  kills\n" in out and "0  differences" in out


@pytest.mark.skipif(sys.platform != "linux", reason="bounds memory as Linux does")
def test_readers_read_or_say_why_not():
    out = run("tests.soak.readers", "--inputs", "25")
    assert "each was read, or refused in one sentence" in out and out.count(" refused\n") == 10
