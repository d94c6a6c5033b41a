"""The comparison on a CPU: the package, dense layers and other sparse libraries take turns in one process.

    python -m bench.race            all cases, some eight minutes on a machine that does nothing else
    python -m bench.race --quick    a minute of it: blocks of 32 and 1, 50, 90 and 99 %, one thread
    python -m bench.race --kernel conv2d [--quick]      the convolutions in place of the linear layers

Answers are checked against a masked dense layer in float64 before anything is timed. The file has one JSON line for
each contestant of each case; the tables show every case, those where the package is slower marked LOSES.
The machine must be otherwise idle: a busy one slows all contestants, but not all alike.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NEEDED = 2
"""Exit code: a package is missing, or the arguments make no sense."""


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.race",
        description=(__doc__ or "").replace("``", ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kernel", choices=("linear", "conv2d"), default="linear", help="what is raced")
    parser.add_argument("--quick", action="store_true", help="the cases of a minute")
    parser.add_argument("--out", type=Path, help="results file (default: bench/out/cpu_<kernel>.jsonl, or _quick)")
    parser.add_argument("--show", type=Path, metavar="FILE", help="measure nothing; print the tables of a file")
    given = parser.parse_args(argv)
    if given.show is not None and (given.quick or given.out is not None):
        parser.error("--show measures nothing: it goes with neither --quick nor --out")
    if given.show is not None and not given.show.is_file():
        parser.error(f"--show: there is no file {given.show}")
    return given


def main(argv: Sequence[str] | None = None) -> int:
    """Race, write the results file, print the tables; 1 if an answer was wrong or a contestant failed."""
    given = options(argv)
    try:
        from rich.console import Console
    except ImportError as error:
        print(f"error: {error}; pip install -e '.[bench]'", file=sys.stderr)
        return NEEDED
    from bench.gpu.results import ROOT, read_rows

    name = f"cpu_{given.kernel}{'_quick' if given.quick else ''}.jsonl"
    out = given.out or ROOT / "bench" / "out" / name
    console = Console() if sys.stdout.isatty() else Console(width=200)
    if given.show is not None:
        rows = read_rows(given.show)
    else:
        from bench.cpu.results import write_rows

        rows = measure(given.kernel, given.quick)
        write_rows(out, rows)
    print_tables(console, rows)
    if given.show is None:
        console.print(f"written: {out}", soft_wrap=True)
    return 1 if any("refused" in row or "error" in row for row in rows) else 0


def measure(kernel: str, quick: bool) -> list[dict[str, Any]]:
    """Run the cases, a bar on a terminal and a line a case elsewhere."""
    from rich.console import Console
    from rich.progress import Progress

    from bench.cpu.cases import cases, quick_cases
    from bench.cpu.conv_cases import conv_cases, quick_conv_cases
    from bench.cpu.results import AnyCase, circumstances
    from bench.cpu.run import SECONDS, run_cases

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    chosen: list[AnyCase]
    if kernel == "linear":
        chosen = list(quick_cases() if quick else cases(cores))
    else:
        chosen = list(quick_conv_cases() if quick else conv_cases(cores))
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(chosen))

        def say(line: str) -> None:
            progress.update(task, advance=1, description=line.split(":")[0])
            if not console.is_terminal:
                print(line, file=sys.stderr, flush=True)

        return run_cases(chosen, circumstances(), say, SECONDS)


def print_tables(console: Any, rows: list[dict[str, Any]]) -> None:
    """Print the cases, the goals, and what was not timed and why."""
    from bench.cpu.results import Race
    from bench.cpu.table import case_table, goal_table, losing

    race = Race(rows)
    if not race.rows:
        console.print("nothing was measured")
        return
    one = rows[0]
    console.print(case_table(race))
    console.print(goal_table(race, one["device"]))
    reasons = {
        f"{row['contestant']} {word.replace('_', ' ')}: {row[word]}"
        for row in rows
        for word in ("refused", "error", "not_supported")
        if word in row
    }
    for reason in sorted(reasons):
        console.print(reason, markup=False)
    console.print(f"{one['device']}, {one['path']}; torch {one['torch']}, {one['date']}, commit {one['commit']}")
    console.print("rate: products of stored blocks a second, as a share of those of the best dense contestant")
    console.print(f"in {len(losing(race))} of {len(race.cases())} cases another contestant is faster")


if __name__ == "__main__":
    from sparsekern import keep_freed_memory

    keep_freed_memory()  # the contestants alike; what it is for says its docstring
    sys.exit(main())
