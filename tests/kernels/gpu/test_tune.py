"""Choosing the fastest by measuring, with times that the test makes up."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from sparsekern.kernels.gpu import roofline, tables
from sparsekern.kernels.gpu.config import Config, Outer, Problem
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import InterpreterError, OutOfResources, PTXASError

from tests.gpu_checks import calls, corners
from tests.gpu_conv2d_checks import edge_case
from tests.kernels.calls import AnyCase
from tests.oracle import all_cells

EXACT = torch.tensor([3.0, 4.0])
CONFIGS = [Outer(tile_in, 16, 4, 3) for tile_in in (16, 32, 64, 128)]


class Bench:
    """Launches that take a given time, or fail."""

    def __init__(self, *outcomes: float | Exception, answers: dict[Config, Tensor] | None = None) -> None:
        self.answers = answers or {}
        self.outcomes = dict(zip(CONFIGS, outcomes, strict=True))
        self.launched: list[Config] = []
        self.last: float = 0.0

    def launch(self, config: Config) -> Tensor:
        self.launched.append(config)
        outcome = self.outcomes[config]  # type: ignore[index]
        if isinstance(outcome, Exception):
            raise outcome
        self.last = outcome
        return self.answers.get(config, EXACT)

    def seconds(self, run: Callable[[], object]) -> float:
        run()
        return self.last


@pytest.mark.parametrize("best", range(4))
def test_the_least_time_wins(best: int) -> None:
    bench = Bench(*(1.0 if i == best else 2.0 for i in range(4)))

    assert tables.fastest(CONFIGS, bench.launch, EXACT, bench.seconds) == CONFIGS[best]
    assert bench.launched == [c for c in CONFIGS for _ in ("to check", "to time")]


def test_of_equal_ones_the_better_guess_wins() -> None:
    bench = Bench(3.0, 2.0, 2.0, 2.0)

    assert tables.fastest(CONFIGS, bench.launch, EXACT, bench.seconds) == CONFIGS[1]


def test_one_that_does_not_run_is_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(RuntimeError("out of resource: shared memory"), 2.0, ValueError("a compiler's defect"), 1.0)

    with caplog.at_level(logging.INFO, "sparsekern"):
        assert tables.fastest(CONFIGS, bench.launch, EXACT, bench.seconds) == CONFIGS[3]

    assert [r.getMessage().split(" does not run: ")[1] for r in caplog.records] == [
        "out of resource: shared memory",
        "a compiler's defect",
    ]


@pytest.mark.parametrize("wrong", [EXACT * 1.01, EXACT * float("nan"), -EXACT, torch.zeros(2)])
def test_the_fastest_one_loses_if_its_answer_is_wrong(wrong: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(2.0, 1.0, 3.0, 3.0, answers={CONFIGS[1]: wrong})

    assert tables.fastest(CONFIGS, bench.launch, EXACT, bench.seconds) == CONFIGS[0]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "its answer is off by" in record.getMessage()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rounding_is_not_wrong(dtype: torch.dtype) -> None:
    exact = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    rounded, other = exact.to(dtype), (exact * (1 + 2**-12)).to(dtype)

    assert tables.share_off(other, rounded) <= tables.allowed(dtype)
    assert tables.share_off(torch.zeros(3), torch.zeros(3)) == 0


def test_an_error_that_takes_the_device_with_it_is_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an illegal access every later launch fails too: the fastest so far would be chosen from a few."""
    bench = Bench(2.0, RuntimeError("CUDA error: an illegal memory access"), 1.0, 1.0)

    def synchronize() -> None:
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        tables.fastest(CONFIGS, bench.launch, EXACT, bench.seconds)


@pytest.mark.parametrize(
    "case", [corners((16, 16)), corners((16, 16), tokens=7), edge_case()], ids=lambda c: type(c).__name__
)
def test_what_is_launched_is_compared_with_the_same_tensor(case: AnyCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same layout: of each kernel, those of a convolution too."""
    compared: dict[str, float] = {}

    def run(problem: Problem, launch: tables.Launch, exact: Callable[[], Tensor]) -> None:
        answer, wanted = launch(roofline.candidates(problem)[0]), exact()
        assert answer.shape == wanted.shape
        compared[problem.kernel] = tables.share_off(answer, wanted)

    monkeypatch.setattr(tables, "run", run)
    calls.results(case)
    calls.all_norms(case)
    calls.chosen_norms(case, *all_cells(case))
    assert len(compared) == 5 and max(compared.values()) <= tables.allowed(torch.float32)


def test_none_that_runs() -> None:
    first = RuntimeError("the first")
    bench = Bench(first, *(RuntimeError("later") for _ in range(3)))

    with pytest.raises(RuntimeError, match="none of 4 configurations runs") as raised:
        tables.fastest(CONFIGS, bench.launch, EXACT, bench.seconds)

    assert raised.value.__cause__ is first


def test_by_default_the_median_of_real_launches_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(4.0, 3.0, 1.0, 2.0)
    monkeypatch.setattr(tables, "median_seconds", bench.seconds)

    assert tables.fastest(CONFIGS, bench.launch, EXACT) == CONFIGS[2]


def test_median_seconds_are_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's are milliseconds."""
    import triton.testing

    monkeypatch.setattr(triton.testing, "do_bench", lambda run, **how: 250.0 if how["return_mode"] == "median" else 0.0)

    assert tables.median_seconds(lambda: None) == 0.25


@pytest.fixture
def gpu_there(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine on which it is possible to measure."""
    monkeypatch.setattr(tables, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return monkeypatch


def test_one_process_on_a_gpu_may_measure(gpu_there: pytest.MonkeyPatch) -> None:
    assert tables.why_not_measured() is None


@pytest.mark.parametrize("interpreted", [True, False])
def test_without_a_gpu_there_is_nothing_to_measure(gpu_there: pytest.MonkeyPatch, interpreted: bool) -> None:
    gpu_there.setattr(tables, "interpreted", lambda: interpreted)
    gpu_there.setattr(torch.cuda, "is_available", lambda: interpreted)

    assert tables.why_not_measured() == "there is no GPU"


@pytest.mark.parametrize("ranks", [1, 2])
def test_several_ranks_do_not_measure(gpu_there: pytest.MonkeyPatch, ranks: int) -> None:
    gpu_there.setattr(torch.distributed, "is_initialized", lambda: True)
    gpu_there.setattr(torch.distributed, "get_world_size", lambda: ranks)

    reason = tables.why_not_measured()

    assert reason is None if ranks == 1 else reason is not None and reason.startswith("several ranks are running")


def test_nothing_is_measured_inside_a_graph(gpu_there: pytest.MonkeyPatch) -> None:
    gpu_there.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)

    assert tables.why_not_measured() == "a CUDA graph is being captured"


def test_a_figure_says_where_and_when_it_was_measured() -> None:
    found = tables.circumstances()

    assert set(found) == {"device", "torch", "triton", "date"}
    assert found["torch"] == torch.__version__
    assert len(found["date"]) == len("2026-01-31")


# A configuration that does not run.

PROBLEM = Problem("fwd", "sm_90", "fp16", 128, 128, 12, 3)
FAILURES = [
    OutOfResources(232_449, 232_448, "shared memory"),
    PTXASError("ptxas fatal"),
    CompilationError("x = 1", None, "no such layout"),
    RuntimeError("PassManager::run failed"),
]


def launching(bad: set[Config], error: Exception, launched: list[Config]) -> tables.Launch:
    def launch(config: Config) -> Tensor:
        launched.append(config)
        if config in bad:
            raise error
        return EXACT

    return launch


@pytest.mark.usefixtures("no_tables")
@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_the_next_candidate_runs_where_the_default_does_not_compile_or_fit(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said once, and remembered."""
    guesses, launched = roofline.candidates(PROBLEM), []
    launch = launching(set(guesses[:2]), error, launched)

    tables.run(PROBLEM, launch, lambda: EXACT)
    tables.run(PROBLEM, launch, lambda: EXACT)

    assert launched == [*guesses[:3], guesses[2]]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert str(guesses[0]) in record.getMessage() and str(guesses[2]) in record.getMessage()


@pytest.mark.usefixtures("no_tables")
def test_where_no_candidate_runs_the_first_error_is_raised() -> None:
    launched: list[Config] = []
    with pytest.raises(OutOfResources, match="Required: 232449"):
        tables.run(PROBLEM, launching(set(roofline.candidates(PROBLEM)), FAILURES[0], launched), lambda: EXACT)
    assert launched == roofline.candidates(PROBLEM)


@pytest.mark.usefixtures("no_tables")
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("no memory"),
        torch.AcceleratorError("illegal address"),
        InterpreterError("out of bounds"),
        TypeError(),
    ],
)
def test_other_errors_are_raised_at_once(error: Exception) -> None:
    """A smaller tile would need as much memory; and a fault in a kernel must not be hidden."""
    launched: list[Config] = []
    launch = launching(set(roofline.candidates(PROBLEM)), error, launched)
    with pytest.raises(type(error)):
        tables.run(PROBLEM, launch, lambda: EXACT)
    assert len(launched) == 1

    def second(config: Config) -> Tensor:
        """The default does not fit, and the next one meets the error."""
        if config == roofline.candidates(PROBLEM)[0]:
            raise FAILURES[0]
        return launch(config)

    with pytest.raises(type(error)):
        tables.run(PROBLEM, second, lambda: EXACT)
    assert len(launched) == 2
