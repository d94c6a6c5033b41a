from __future__ import annotations

import torch

from sparsekern.analysis.allocations import peak_above

CPU = torch.device("cpu")


def test_what_is_freed_in_between_does_not_add_up():
    def run():
        for _ in range(3):
            torch.zeros(1000)  # 4000 bytes, gone before the next

    assert peak_above(run, CPU) == 4000


def test_the_highest_moment_counts():
    def run():
        a = torch.zeros(16)
        b = torch.zeros(32)
        del a
        del b
        torch.zeros(16)

    assert peak_above(run, CPU) == 64 + 128


def test_nothing():
    kept = torch.zeros(8)
    assert peak_above(kept.zero_, CPU) == 0
