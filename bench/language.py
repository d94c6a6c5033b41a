"""What language models learnt in given runs: bits per byte after equal steps and after equal time, as a table.

    python -m bench.language runs/set runs/rigl runs/dense-short --out bench/results/language.jsonl    collect and show
    python -m bench.language --show bench/results/language.jsonl                                        show

A row is an epoch of a network of ``sparsekern train --recipe gpt``: what it had cost and reached. A dense network that
trains for a sixth of the steps with a learning rate of its own that falls to the end is a fairer rival at equal time
than the first sixth of a long training: give it as a run of its own (``--no-sparse --epochs``).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.cpu.results import write_rows
from bench.gpu.results import read_rows
from sparsekern.lab.report.tables import markdown

Row = dict[str, Any]


def collect(folder: Path) -> list[Row]:
    """Return the rows of a run folder, without the topology's metrics."""
    config = json.loads((folder / "config.json").read_text())["config"]
    rows, seconds = [], dict[tuple[int, str], float]()
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        found = json.loads(line)
        key = found["seed"], found["network"]
        seconds[key] = seconds.get(key, 0.0) + found["seconds"]
        name = "dense" if found["network"] == "dense" else config["method"]
        kept = {what: found[what] for what in ("seed", "epoch", "step", "bits_per_byte", "ms_per_step")}
        rows.append({"network": name, "epochs": config["epochs"], **kept, "seconds": round(seconds[key], 1)})
    return rows


def table(rows: Sequence[Row]) -> str:
    """Return the table: one line for each network and length of training, means over seeds."""
    ends: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if row["epoch"] == row["epochs"]:
            ends.setdefault((row["network"], row["epochs"]), []).append(row)
    lines = [
        [
            name,
            str(found[0]["step"]),
            str(len(found)),
            f"{_mean(found, 'bits_per_byte'):.2f}",
            f"{_median_ms(rows, name, epochs):.0f}",
            f"{_mean(found, 'seconds') / 60:.0f}",
        ]
        for (name, epochs), found in ends.items()
    ]
    return markdown((["network", "steps", "seeds", "bits per byte", "ms a step", "minutes"], lines))


def _mean(rows: Sequence[Row], what: str) -> float:
    return sum(row[what] for row in rows) / len(rows)


def _median_ms(rows: Iterable[Row], network: str, epochs: int) -> float:
    times = sorted(row["ms_per_step"] for row in rows if (row["network"], row["epochs"]) == (network, epochs))
    return float(times[len(times) // 2])


def main(arguments: Sequence[str] | None = None) -> None:
    """Collect runs, or read a file, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="folders of runs")
    parser.add_argument("--out", type=Path, help="file for the rows of the runs")
    parser.add_argument("--show", type=Path, help="show this file instead")
    options = parser.parse_args(arguments)
    if options.show is None and not options.folders:
        parser.error("give folders of runs, or a file with --show")
    rows = read_rows(options.show) if options.show else [row for folder in options.folders for row in collect(folder)]
    if options.out:
        write_rows(options.out, rows)
    print(table(rows))


if __name__ == "__main__":
    main()
