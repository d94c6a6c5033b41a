"""Milliseconds of calls that take turns on a CPU: the stop watch of :mod:`bench.gpu.clock`, with warm caches.

A call finds in the caches what the contestant before it left there: a sparse step of 7 ms took 3 ms longer after a
dense one than after another sparse one. And a virtual machine may give back memory that lay idle for some seconds: a
sparse step of 180 ms took 265 ms after the four seconds of a CSR product. So a call is made twice in its turn, and the
second one is timed, unless it is long.
"""

from __future__ import annotations

import torch

from bench.gpu.clock import Call, Clock, Timing

SHORT = 500.0
"""Milliseconds. In a longer call the caches and pages of the beginning do not matter."""


class Stopwatch(Clock):
    """Times calls on the CPU."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))

    def _sample(self, run: Call, timing: Timing) -> float:
        if not timing.samples or timing.samples[-1] < SHORT:
            run()
        return super()._sample(run, timing)
