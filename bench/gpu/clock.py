"""Milliseconds of calls that take turns.

Two figures per call, because they answer different questions:

    ms       on the device: caches flushed before each call, and the queue held back until the call is wholly in it, so
             that no time of Python is in it. p20 and p80 beside the median.
    wall_ms  as a program sees it: many calls in a row, Python included, nothing flushed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from bench.gpu.part import check_device, say_what_failed

FLUSH_BYTES = 256 * 2**20
"""More than any L2 cache holds."""

HOLD_CYCLES_A_SECOND = 2e9
"""About the clock of a GPU; the hold is only made long enough, never measured."""

MOST_HOLD = 0.05
"""Seconds. A call that still is not in the queue by then waits for the device itself; it is timed as it is."""

Call = Callable[[], object]


@dataclass
class Timing:
    """What was measured of one contestant."""

    samples: list[float] = field(default_factory=list)
    """Milliseconds on the device."""
    wall_ms: float = float("nan")
    hold: float = 2e-4
    """Seconds by which the queue is held back."""

    def quantile(self, q: float) -> float:
        """Return a quantile of the samples."""
        ordered = sorted(self.samples)
        return ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))]

    def row(self) -> dict[str, float | int]:
        """Return it as fields of a row."""
        return {
            "ms": self.quantile(0.5),
            "p20": self.quantile(0.2),
            "p80": self.quantile(0.8),
            "wall_ms": self.wall_ms,
            "samples": len(self.samples),
        }


class Clock:
    """Times calls on one device. On the CPU (a rehearsal) it is a stop watch."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        if self.cuda:
            self.flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device)
            self.start, self.stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def race(
        self, contestants: dict[str, Call], rounds: int = 20, seconds: float = 2.0
    ) -> tuple[dict[str, Timing], dict[str, str]]:
        """Let calls take turns; return their timings, and the errors of those that failed.

        Args:
            contestants: what to call, by name.
            rounds: samples of each, at most.
            seconds: after which five rounds are enough (two, for a contestant that alone takes that long).
        """
        timings: dict[str, Timing] = {}
        errors: dict[str, str] = {}
        for name, run in contestants.items():
            try:
                timings[name] = self._warm_up(run)
            except Exception as error:
                errors[name] = say_what_failed(error)
        began = time.monotonic()
        for done in range(rounds):
            if done >= 5 and time.monotonic() - began > seconds:
                break
            for name, timing in timings.items():
                slow = len(timing.samples) * timing.quantile(0.5) / 1e3 > seconds if timing.samples else False
                if name not in errors and not (slow and len(timing.samples) >= 2):
                    try:
                        timing.samples.append(self._sample(contestants[name], timing))
                    except Exception as error:
                        errors[name] = say_what_failed(error)
        for name, timing in timings.items():
            try:
                if name not in errors:
                    timing.wall_ms = self._wall(contestants[name], timing)
            except Exception as error:
                errors[name] = say_what_failed(error)
                check_device(self.device)
        return {name: timing for name, timing in timings.items() if name not in errors}, errors

    def median_seconds(self, run: Call) -> float:
        """Return the median of one call, for a tuner; errors are the caller's."""
        timing = self._warm_up(run)
        for _ in range(15 if self.cuda else 1):
            timing.samples.append(self._sample(run, timing))
        return timing.quantile(0.5) / 1e3

    def _warm_up(self, run: Call) -> Timing:
        timing = Timing()
        run()
        check_device(self.device)
        if self.cuda:
            for _ in range(2):
                began = time.perf_counter()
                run()
                timing.hold = min(MOST_HOLD, 1e-4 + 1.5 * (time.perf_counter() - began))
                torch.cuda.synchronize()
        return timing

    def _sample(self, run: Call, timing: Timing) -> float:
        if not self.cuda:
            began = time.perf_counter()
            run()
            return (time.perf_counter() - began) * 1e3
        try:
            while True:
                torch.cuda._sleep(int(timing.hold * HOLD_CYCLES_A_SECOND))
                self.flush.zero_()
                self.start.record()
                run()
                self.stop.record()
                late = self.start.query()  # the device waited for Python: hold it longer
                self.stop.synchronize()
                if not late or timing.hold >= MOST_HOLD:
                    return self.start.elapsed_time(self.stop)
                timing.hold = min(MOST_HOLD, 2 * timing.hold)
        except RuntimeError:  # such as an illegal access, or memory that is short: does the device still answer?
            check_device(self.device)
            raise

    def _wall(self, run: Call, timing: Timing) -> float:
        if not self.cuda:
            return timing.quantile(0.5)
        calls = max(2, min(50, int(50 / max(timing.quantile(0.5), 0.1))))
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
        return (time.perf_counter() - began) * 1e3 / calls
