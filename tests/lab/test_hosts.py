"""The command on two hosts: network namespaces with a cable between them, on each of them torchrun and a rank.

They begin once: the second host comes late, both train, then it vanishes. ``tests/soak/hosts.py`` does more.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from safetensors.torch import load_file

from sparsekern.lab import Interrupted, resume, start
from sparsekern.lab.store import METRICS, Keeping
from tests.hosts import hosts_or_reason
from tests.lab.runs import StopAt, changed
from tests.lab.test_distributed import MLP

TIMEOUT = 10
"""Seconds of ``--timeout``."""


class Seen(NamedTuple):
    """What happened: the folder of the run, what was there before the second host came, and how the first one ended."""

    folder: Path
    early: bool
    code: int
    seconds: float
    said: str


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> Seen:
    folder = tmp_path_factory.mktemp("hosts")
    hosts, reason = hosts_or_reason()
    if hosts is None:
        pytest.skip(reason)
    with hosts:
        options = ["--width=32", "--block-size=8", "--sparsity=0.5", "--epochs=600", "--batch-size=400", "--seeds=1"]
        options += ["--update-every=2", "--device=cpu", "--no-dense", "--save-every=1", f"--out={folder / 'run'}"]
        first = hosts.torchrun(0, ["train", *options, f"--timeout={TIMEOUT}"], folder / "first.log")
        time.sleep(5)
        early = (folder / "run").exists()
        second = hosts.torchrun(1, ["train", *options, f"--timeout={TIMEOUT}"], folder / "second.log")
        deadline = time.monotonic() + 240
        while not (folder / "run" / METRICS).is_file() or not (folder / "run" / METRICS).read_text():
            assert time.monotonic() < deadline and first.poll() is None, (folder / "first.log").read_text()
            time.sleep(0.1)
        hosts.vanish(1)
        began = time.monotonic()
        code = first.wait(120)
        seconds = time.monotonic() - began
        assert second.wait(10) == -signal.SIGKILL
    return Seen(folder / "run", early, code, seconds, (folder / "first.log").read_text())


def test_a_host_that_comes_late_is_waited_for(seen):
    assert not seen.early and (seen.folder / METRICS).read_text()


def test_a_host_that_vanishes_ends_the_other(seen):
    """Within the timeout, but for the time that torchrun and a busy machine take."""
    assert seen.code == 1 and seen.seconds < 3 * TIMEOUT
    words = f"error: rank 0: rank 1 has ended, or not answered for {TIMEOUT} seconds. stopped at once; what was saved"
    assert f"{words} last is kept. To go on: sparsekern train --resume {seen.folder}" in seen.said.splitlines()


def test_the_run_goes_on_with_the_same_blocks(seen, tmp_path):
    with pytest.raises(Interrupted):
        resume(seen.folder, StopAt(6), keep=1)
    newest = max((seen.folder / "checkpoints" / "seed-0").glob("step-*"))
    with pytest.raises(Interrupted):
        start(changed(MLP, epochs=600, dense=False), tmp_path / "one", StopAt(int(newest.name[5:])), Keeping(keep=1))
    one = load_file(tmp_path / "one" / "checkpoints" / "seed-0" / newest.name / "sparse.safetensors")
    for name, tensor in load_file(newest / "sparse.safetensors").items():
        assert tensor.is_floating_point() or tensor.equal(one[name]), name
