"""Predictions of ``sparsekern plan`` beside measured steps: time and memory of 20 runs.

    python -m bench.plan_check           about five minutes on a machine that does nothing else
    python -m bench.plan_check --show bench/results/plan_check.jsonl      the table of a file, nothing measured

For each number of threads the machine is measured as ``sparsekern plan --measure`` does; then each run is predicted
and takes some steps as ``sparsekern train`` does. Time is the median of the steps. Memory is the peak of PyTorch's
allocations in a step, with what is held between two steps. The exit code is 1 if the median error of time is
above 15 %, one is above 30 %, or an error of memory is above 5 %.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from bench.cpu.results import circumstances, rounded, write_rows
from bench.gpu.results import ROOT, Row, read_rows
from sparsekern import keep_freed_memory
from sparsekern.analysis.plan import Machine, measure, predict, trace
from sparsekern.analysis.summary import peak_above
from sparsekern.lab import Config
from sparsekern.lab.cost import Planned
from sparsekern.lab.train import Learner

COMMITTED = ROOT / "bench" / "results" / "plan_check.jsonl"

MEDIAN, WORST, MEMORY = 0.15, 0.30, 0.05
"""Errors of time, median and worst, and of memory, that are allowed."""

WARM_UP, STEPS, SECONDS = 2, 5, 3.0
"""Steps that are not timed, steps that are at least, and how long they are taken: one disturbed moment is no median."""


class Case(NamedTuple):
    """A run: a recipe with a batch, a sparsity (None is the dense network), a side of the blocks, threads."""

    recipe: str
    batch: int
    sparsity: float | dict[str, float] | None
    block: int
    threads: int


GPT = {"mlp": 0.9, "attention": 0.7}

CASES = (
    Case("gpt-nano", 16, 0.9, 16, 1),
    Case("gpt-nano", 16, GPT, 1, 1),
    Case("gpt-nano", 16, 0.5, 32, 1),
    Case("gpt-nano", 16, None, 16, 1),
    Case("gpt", 4, GPT, 32, 1),
    Case("gpt", 4, 0.5, 16, 1),
    Case("gpt", 4, None, 16, 1),
    Case("mlp", 64, 0.9, 16, 1),
    Case("mlp", 64, 0.95, 1, 1),
    Case("mlp", 64, None, 16, 1),
    Case("resnet20", 64, 0.8, 16, 1),
    Case("vgg16-small", 64, 0.9, 16, 1),
    Case("simplevit-tiny", 32, 0.9, 32, 1),
    Case("gpt-nano", 16, GPT, 16, 2),
    Case("gpt", 8, GPT, 32, 2),
    Case("gpt", 8, 0.9, 64, 2),
    Case("gpt", 4, None, 16, 2),
    Case("mlp", 64, 0.9, 32, 2),
    Case("vgg16-small", 64, 0.9, 16, 2),
    Case("simplevit-tiny", 32, 0.75, 32, 2),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the rows."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.plan_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=COMMITTED, help="results file")
    parser.add_argument("--show", type=Path, metavar="FILE", help="measure nothing; print the table of a file")
    parser.add_argument(
        "--threads", type=int, nargs="+", default=(1, 2), help="only runs with these numbers of threads"
    )
    parser.add_argument(
        "--cpu-time", action="store_true", help="time by the processor's clock, on a busy machine; one thread only"
    )
    given = parser.parse_args(argv)
    if given.cpu_time and tuple(given.threads) != (1,):
        parser.error("--cpu-time counts the time of all threads: it goes with --threads 1 only")
    console = Console() if sys.stdout.isatty() else Console(width=140)
    if given.show is not None:
        rows = read_rows(given.show)
    else:
        torch.set_flush_denormal(True)  # as `sparsekern train`
        common = circumstances()
        cases = [case for case in CASES if case.threads in given.threads]
        rows = [
            {**row, **common} for row in measured(cases, time.process_time if given.cpu_time else time.perf_counter)
        ]
        write_rows(given.out, rows)
    console.print(table_of(rows))
    console.print(summary_of(rows))
    return 1 if misses(rows) else 0


def measured(cases: Sequence[Case], watch: Callable[[], float]) -> Iterator[Row]:
    """Yield a row for each case, as they are measured; a line to stderr says which is."""
    before = torch.get_num_threads()
    try:
        for threads in sorted({case.threads for case in cases}):
            torch.set_num_threads(threads)
            began = time.perf_counter()
            machine = measure({"threads": threads}, lambda _: None, watch)
            seconds = time.perf_counter() - began
            print(f"measured the machine with {threads} threads in {seconds:.0f} s", file=sys.stderr, flush=True)
            for case in (case for case in cases if case.threads == threads):
                row = row_of(case, machine, watch)
                print(json.dumps(row), file=sys.stderr, flush=True)
                yield row
    finally:
        torch.set_num_threads(before)


def row_of(case: Case, machine: Machine, watch: Callable[[], float] = time.perf_counter) -> Row:
    """Predict a run, take its steps, and return both."""
    more: dict[str, Any] = {} if case.sparsity is None else {"sparsity": case.sparsity}
    config = Config(recipe=case.recipe, batch_size=case.batch, block_size=case.block, method="static", **more)
    network = "dense" if case.sparsity is None else "sparse"
    planned = Planned(config, image=(1, 8) if case.recipe == "mlp" else (3, 32))
    predicted = predict(trace(planned.step(network)), machine)
    learner = Learner(planned.run(case.batch), network, seed=0)

    def step() -> None:
        learner.batch = 0  # the same batch again
        learner.step()

    samples: list[float] = []
    for _ in range(WARM_UP):
        step()
    began = time.perf_counter()
    while len(samples) < STEPS or time.perf_counter() - began < SECONDS:
        started = watch()
        step()
        samples.append(1e3 * (watch() - started))
    gradients = sum(p.numel() * p.element_size() for p in learner.model.parameters() if p.requires_grad)
    peak = learner.training_bytes() - gradients + peak_above(step, torch.device("cpu"))
    median = statistics.median(samples)
    ms = 1e3 * predicted.step_seconds
    return {
        "recipe": case.recipe,
        "batch": case.batch,
        "sparsity": case.sparsity,
        "block": case.block,
        "threads": case.threads,
        "predicted_ms": rounded(ms),
        "ms": rounded(median),
        "fastest_ms": rounded(min(samples)),
        "samples": len(samples),
        "clock": watch.__name__,
        "time_error": rounded(ms / median - 1),
        "predicted_bytes": predicted.memory.total,
        "bytes": peak,
        "memory_error": rounded(predicted.memory.total / peak - 1),
        "parts_ms": {part: rounded(1e3 * spent) for part, spent in predicted.seconds.items() if spent},
    }


def errors(rows: Sequence[Row], name: str) -> list[float]:
    """Return the absolute errors of rows."""
    return [abs(row[f"{name}_error"]) for row in rows]


def misses(rows: Sequence[Row]) -> list[str]:
    """Return what is not as good as it must be, in words."""
    spent, held = errors(rows, "time"), errors(rows, "memory")
    found = {
        f"the median error of time is above {MEDIAN:.0%}": statistics.median(spent) > MEDIAN,
        f"an error of time is above {WORST:.0%}": max(spent) > WORST,
        f"an error of memory is above {MEMORY:.0%}": max(held) > MEMORY,
    }
    return [words for words, missed in found.items() if missed]


def summary_of(rows: Sequence[Row]) -> str:
    """Return the errors in one line."""
    spent, held = errors(rows, "time"), errors(rows, "memory")
    words = "; ".join(misses(rows)) or "all as they must be"
    return (
        f"{len(rows)} runs. Time: median error {statistics.median(spent):.1%}, worst {max(spent):.1%}. "
        f"Memory: median {statistics.median(held):.2%}, worst {max(held):.2%}. {words}."
    )


def table_of(rows: Sequence[Row]) -> Table:
    """Return a line for each run."""
    table = Table(title="a step, predicted and measured", title_justify="left")
    run = ("recipe", "batch", "sparsity", "block", "threads")
    headings = (*run, "predicted ms", "ms", "error", "predicted MiB", "MiB", "error")
    for head in headings:
        table.add_column(head, justify="left" if head == "recipe" else "right")
    for row in rows:
        sparsity = row["sparsity"]
        if isinstance(sparsity, dict):
            sparsity = "/".join(f"{part:g}" for part in sparsity.values())
        table.add_row(
            row["recipe"],
            str(row["batch"]),
            "dense" if sparsity is None else str(sparsity),
            "" if row["sparsity"] is None else str(row["block"]),
            str(row["threads"]),
            f"{row['predicted_ms']:.1f}",
            f"{row['ms']:.1f}",
            f"{row['time_error']:+.1%}",
            f"{row['predicted_bytes'] / 2**20:.1f}",
            f"{row['bytes'] / 2**20:.1f}",
            f"{row['memory_error']:+.2%}",
        )
    return table


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
