"""Freed memory stays with the process: page faults tell."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
from sparsekern.kernels.cpu import keep_freed_memory

PROGRAM = """
import resource, torch
import sparsekern as sk

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        large = [torch.ones(size << 18) for size in (8, 40, 70)]  # MiB
        del large
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
assert sk.keep_freed_memory()
faults()
print(faults())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="only glibc can be told so")
def test_large_tensors_are_not_faulted_in_anew() -> None:
    """Without it the 1.2 GB are faulted in anew: 300,000 pages, or 600 huge ones."""
    root = Path(__file__).parents[3]
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=root, check=True)

    assert int(result.stdout) < 100


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory()


def test_no_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not keep_freed_memory()
