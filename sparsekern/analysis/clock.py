"""The clock: milliseconds of calls that take turns in one process, on a CPU and on CUDA.

Contestants take turns, so that a slow minute slows all of them alike. Everything that the package and its benchmarks
time beside something else is timed here.

On a CPU, a call finds in the caches what the contestant before it left there: a sparse step of 7 ms took 3 ms longer
after a dense one than after another sparse one. And a virtual machine may give back memory that lay idle for some
seconds: a sparse step of 180 ms took 265 ms after the four seconds of a CSR product. So a call is made twice in its
turn, and the second one is timed, unless it is long.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

Call = Callable[[], object]

LONG = 500.0
"""Milliseconds. In a longer call on a CPU the caches and pages of the beginning do not matter."""

ENOUGH = 5
"""Rounds that are enough once the time is over; two for a contestant that alone takes that long."""

IN_A_ROW = 50.0
"""Milliseconds. On CUDA short calls are timed many in a row, as a program makes them: so many as take this long."""

FLUSH_BYTES = 256 * 2**20
"""More than any L2 cache holds."""

HOLD_CYCLES_A_SECOND = 2e9
"""About the clock of a GPU; the hold is only made long enough, never measured."""

MOST_HOLD = 0.05
"""Seconds. A call that still is not in the queue by then waits for the device itself; it is timed as it is."""


class DeviceLost(BaseException):
    """After an illegal access every call of this process fails. No Exception: handlers of those must not swallow it."""


@dataclass
class Timing:
    """What was measured of one contestant.

    Attributes:
        samples: milliseconds of a call, one for each round.
        wall_ms: milliseconds of a call among many in a row, Python included.
        hold: seconds by which the queue of a GPU is held back.
    """

    samples: list[float] = field(default_factory=list)
    wall_ms: float = math.nan
    hold: float = 2e-4

    def quantile(self, q: float) -> float:
        """Return a quantile of the samples."""
        ordered = sorted(self.samples)
        return ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))]

    @property
    def median(self) -> float:
        """The median of the samples."""
        return self.quantile(0.5)

    @property
    def spread(self) -> float:
        """The distance between the quartiles, as a fraction of the median."""
        return (self.quantile(0.75) - self.quantile(0.25)) / self.median


class Clock:
    """Times calls on one device.

    On CUDA, a sample is the time of a call among several in a row, as a training loop makes them: Python included, if
    that takes longer than the device. With ``device_alone`` it is the time on the device: the caches are flushed before
    each call, and the queue is held back until the call is wholly in it, so that no time of Python is in it.

    Args:
        device: device on which the calls run.
        device_alone: see above; without effect on a CPU.
        watch: clock of a CPU, in seconds: ``time.process_time`` measures CPU time of all threads.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        device_alone: bool = False,
        watch: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.device, self.device_alone, self._watch = device, device_alone, watch
        self.cuda = device.type == "cuda"
        if self.cuda and device_alone:
            self.flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device)
            self.start, self.stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def race(
        self, contestants: Mapping[str, Call], rounds: int = 20, seconds: float = 2.0
    ) -> tuple[dict[str, Timing], dict[str, Exception]]:
        """Time calls that take turns; return their timings, and the errors of those that failed.

        Args:
            contestants: what to call, by name.
            rounds: samples of each, at most.
            seconds: after which five rounds are enough (two, for a contestant that alone takes that long).

        Raises:
            DeviceLost: an error left the GPU without an answer to anything.
        """
        timings: dict[str, Timing] = {}
        errors: dict[str, Exception] = {}
        for name, run in contestants.items():
            try:
                timings[name] = self._warm_up(run)
            except Exception as error:
                errors[name] = error
        began = time.monotonic()
        for done in range(rounds):
            if done >= ENOUGH and time.monotonic() - began > seconds:
                break
            for name, timing in timings.items():
                slow = len(timing.samples) * timing.median / 1e3 > seconds if timing.samples else False
                if name not in errors and not (slow and len(timing.samples) >= 2):
                    try:
                        timing.samples.append(self._sample(contestants[name], timing))
                    except Exception as error:
                        errors[name] = error
        for name, timing in timings.items():
            try:
                if name not in errors:
                    in_a_row = self.cuda and self.device_alone
                    timing.wall_ms = self._in_a_row(contestants[name], timing) if in_a_row else timing.median
            except Exception as error:
                errors[name] = error
                check_device(self.device)
        return {name: timing for name, timing in timings.items() if name not in errors}, errors

    def median_seconds(self, run: Call) -> float:
        """Return the median of one call, for a tuner; errors are the caller's."""
        timing = self._warm_up(run)
        for _ in range(15 if self.cuda else 1):
            timing.samples.append(self._sample(run, timing))
        return timing.median / 1e3

    def replay_ms(self, run: Call) -> float:
        """Return the milliseconds of a replay of a CUDA graph of a call, among many in a row; errors are the caller's.

        The call must have been made before: what it compiles or measures at first cannot be captured.
        """
        here, beside = torch.cuda.current_stream(self.device), torch.cuda.Stream(self.device)
        beside.wait_stream(here)
        with torch.cuda.stream(beside):
            run()
        here.wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        timing = Timing()
        timing.samples.append(self._in_a_row(graph.replay, timing))
        return self._in_a_row(graph.replay, timing)

    def _warm_up(self, run: Call) -> Timing:
        timing = Timing()
        run()
        check_device(self.device)
        if self.cuda:
            for _ in range(2):
                began = time.perf_counter()
                run()
                timing.hold = min(MOST_HOLD, 1e-4 + 1.5 * (time.perf_counter() - began))
                torch.cuda.synchronize(self.device)
        return timing

    def _sample(self, run: Call, timing: Timing) -> float:
        try:
            if not self.cuda:
                return self._on_cpu(run, timing)
            return self._on_device(run, timing) if self.device_alone else self._in_a_row(run, timing)
        except RuntimeError:  # such as an illegal access, or memory that is short: does the device still answer?
            check_device(self.device)
            raise

    def _on_cpu(self, run: Call, timing: Timing) -> float:
        if not timing.samples or timing.samples[-1] < LONG:
            run()
        began = self._watch()
        run()
        return (self._watch() - began) * 1e3

    def _on_device(self, run: Call, timing: Timing) -> float:
        while True:
            torch.cuda._sleep(int(timing.hold * HOLD_CYCLES_A_SECOND))
            self.flush.zero_()
            self.start.record()
            run()
            self.stop.record()
            late = self.start.query()  # the device waited for Python: hold it longer
            self.stop.synchronize()
            if not late or timing.hold >= MOST_HOLD:
                return float(self.start.elapsed_time(self.stop))
            timing.hold = min(MOST_HOLD, 2 * timing.hold)

    def _in_a_row(self, run: Call, timing: Timing) -> float:
        calls = max(2, min(50, int(IN_A_ROW / max(timing.median, 0.1)))) if timing.samples else 2
        torch.cuda.synchronize(self.device)
        began = time.perf_counter()
        for _ in range(calls):
            run()
        torch.cuda.synchronize(self.device)
        return (time.perf_counter() - began) * 1e3 / calls


def race(
    contestants: Mapping[str, Call],
    device: torch.device,
    rounds: int,
    seconds: float = math.inf,
    watch: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Return the timings of calls that take turns, by name; an error of one ends the race.

    Args:
        contestants: what to call, by name.
        device: device on which they run.
        rounds, seconds: as in :meth:`Clock.race`.
        watch: as in :class:`Clock`.
    """
    timings, errors = Clock(device, watch=watch).race(contestants, rounds, seconds)
    for error in errors.values():
        raise error
    return timings


def check_device(device: torch.device) -> None:
    """Raise :class:`DeviceLost` if the GPU answers nothing any more."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise DeviceLost(str(error)) from error
