"""How calls are timed, on a CPU and on a GPU that is made up."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from sparsekern.analysis import Clock, Timing, race
from sparsekern.analysis.clock import DeviceLost

CPU = torch.device("cpu")


def test_contestants_take_turns_and_a_short_call_is_made_twice():
    calls: list[str] = []
    timings = race({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, CPU, rounds=3)
    assert calls == ["a", "b"] + 3 * ["a", "a", "b", "b"]
    assert {name: len(timing.samples) for name, timing in timings.items()} == {"a": 3, "b": 3}
    assert all(timing.wall_ms == timing.median > 0 for timing in timings.values())


def test_the_second_of_two_short_calls_is_timed_and_a_long_one_is_made_once():
    made, now = [], [0.0]

    def call(milliseconds: float) -> None:
        made.append(milliseconds)
        now[0] += milliseconds / 1e3

    clock, timing = Clock(CPU, watch=lambda: now[0]), Timing()
    for last, calls in ((None, 2), (3.0, 2), (600.0, 1)):
        timing.samples += [] if last is None else [last]
        made.clear()
        assert clock._sample(lambda: call(3.0), timing) == pytest.approx(3.0) and len(made) == calls


def test_quantiles_and_spread_by_hand():
    timing = Timing([4.0, 1.0, 2.0, 8.0, 3.0])
    assert (timing.median, timing.quantile(0.25), timing.quantile(0.75), timing.quantile(1)) == (3.0, 2.0, 4.0, 8.0)
    assert timing.spread == pytest.approx(2 / 3) and math.isnan(timing.wall_ms)


def test_a_race_ends_when_its_time_is_over_but_not_before_five_rounds():
    timings, _ = Clock(CPU).race({"a": lambda: None}, rounds=50, seconds=0)
    assert len(timings["a"].samples) == 2  # alone it took longer than no time at all
    assert len(race({"a": lambda: None}, CPU, rounds=7)["a"].samples) == 7


def test_an_error_ends_a_race_or_is_said_beside_the_others():
    contestants = {"bad": lambda: 1 / 0, "good": lambda: None}
    timings, errors = Clock(CPU).race(contestants, rounds=2)
    assert set(timings) == {"good"} and isinstance(errors["bad"], ZeroDivisionError)
    with pytest.raises(ZeroDivisionError):
        race(contestants, CPU, rounds=2)


class FakeGpu:
    """A queue that is held back for a while; a call takes ``python`` seconds to get into it and 3 ms to run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, python: float, *, device_alone: bool = True) -> None:
        self.held, self.python, self.clock = [], python, Clock(CPU, device_alone=device_alone)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.held.append(cycles / 2e9))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
        self.clock.cuda, self.clock.flush, self.clock.start, self.clock.stop = True, torch.zeros(1), self, self

    def query(self) -> bool:
        return self.held[-1] < self.python

    def elapsed_time(self, stop: FakeGpu) -> float:
        return 3.0

    def record(self) -> None: ...

    def synchronize(self) -> None: ...


@pytest.mark.parametrize(("python", "longest"), [(1e-3, 3e-3), (10.0, 0.05)])
def test_the_queue_is_held_until_the_whole_call_is_in_it_or_for_a_limited_time(monkeypatch, python, longest):
    gpu = FakeGpu(monkeypatch, python)
    timings, errors = gpu.clock.race({"a": lambda: None, "bad": lambda: 1 / 0}, rounds=7, seconds=0)
    assert 2 <= len(timings["a"].samples) <= 5 and timings["a"].median == 3.0
    assert isinstance(errors["bad"], ZeroDivisionError)
    assert min(python, 0.05) <= gpu.held[-1] <= longest and timings["a"].wall_ms < 3.0
    assert gpu.clock.median_seconds(lambda: None) == 3e-3


def test_calls_of_a_layer_are_timed_many_in_a_row_as_a_program_makes_them(monkeypatch):
    gpu, calls = FakeGpu(monkeypatch, 0.0, device_alone=False), []
    timings, _ = gpu.clock.race({"a": lambda: calls.append(1)}, rounds=2, seconds=math.inf)
    assert not gpu.held and len(calls) == 3 + 2 + 50  # three to warm up, two to see how short they are
    assert timings["a"].wall_ms == timings["a"].median < 3.0


@pytest.mark.parametrize("lost", [True, False])
def test_an_error_of_a_call_that_ran_before_is_the_device_only_if_it_answers_nothing_more(monkeypatch, lost):
    gpu, calls_made = FakeGpu(monkeypatch, 0.0), []
    gpu.clock.device = torch.device("cuda")

    def answers(*_) -> None:
        if lost and len(calls_made) > 3:
            raise RuntimeError("an illegal memory access")

    def breaks() -> None:
        calls_made.append(1)
        if len(calls_made) > 3:
            raise torch.OutOfMemoryError("no memory for it")

    monkeypatch.setattr(torch.cuda, "synchronize", answers)
    if lost:
        with pytest.raises(DeviceLost, match="illegal"):
            gpu.clock.race({"a": breaks})
    else:
        timings, errors = gpu.clock.race({"a": breaks, "b": lambda: None})
        assert set(timings) == {"b"} and "no memory" in str(errors["a"])


def test_a_replay_is_timed_after_a_call_beside_and_one_that_is_captured(monkeypatch):
    gpu, did = FakeGpu(monkeypatch, 0.0), []

    class Stream:
        def wait_stream(self, other: Stream) -> None:
            did.append("wait")

    class Graph:
        def replay(self) -> None:
            did.append("replay")

    @contextmanager
    def noted(what: object) -> Iterator[None]:
        did.append("in")
        yield
        did.append("out")

    here = Stream()
    for name, stand_in in (("current_stream", lambda *_: here), ("Stream", lambda *_: Stream()), ("CUDAGraph", Graph)):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, noted)
    assert gpu.clock.replay_ms(lambda: did.append("call")) >= 0
    assert did[:8] == ["wait", "in", "call", "out", "wait", "in", "call", "out"] and set(did[8:]) == {"replay"}
