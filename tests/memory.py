"""What a call allocates, read off PyTorch's own allocator, inside kernels and the backward thread too."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile


class Allocations(NamedTuple):
    """Bytes: the most that was held at once above the start, the largest single tensor, and what is left at the end."""

    peak: int
    largest: int
    kept: int


def allocations(run: Callable[[], object]) -> Allocations:
    """Run once and return what it allocated on the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = run()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    held = torch.tensor([0, *sizes]).cumsum(0)
    del result  # counts as kept
    return Allocations(int(held.max()), max(sizes, default=0), int(held[-1]))
