"""The results file: one JSON line for each contestant of each case, with all that is needed to read it alone."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from sparsekern.kernels.cpu.library import load

import sparsekern
from bench.cpu.cases import Case
from bench.cpu.conv_cases import ConvCase
from bench.gpu.contestants import DENSE, OURS, SPARSE, Contestant
from bench.gpu.results import ROOT, Row, commit
from sparsekern.analysis.clock import Timing
from sparsekern.cli.info import cpu_model

COMMITTED = ROOT / "bench" / "results" / "cpu_linear.jsonl"
"""What the README shows."""

COMMITTED_CONV = ROOT / "bench" / "results" / "cpu_conv2d.jsonl"
"""The same of the convolutions."""

AnyCase = Case | ConvCase
"""What is raced."""


def circumstances() -> Row:
    """Return what every row says beside its figures."""
    library, path = load()
    return {
        "device": cpu_model(),
        "path": path if library is not None else "none",
        "torch": torch.__version__,
        "scipy": _version("scipy"),
        "sparselab": _version("sparselab"),
        "sparsekern": sparsekern.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def rows_of(case: AnyCase, elements: int, taking_part: dict[str, Contestant], timings: dict[str, Timing]) -> list[Row]:
    """Return the rows of a case, the package's with ratios: ``vs_dense`` 2.0 is twice as fast as the best dense one.

    Args:
        case: what was measured.
        elements: numbers that are stored; ``gflops`` counts these only, for the dense ones all.
        taking_part: by name.
        timings: those of them that were timed.
    """
    rows: list[Row] = []
    full = case.in_features * case.out_features
    for name, timing in timings.items():
        kind = taking_part[name].kind
        ms = timing.median
        flops = (3 if case.op == "step" else 1) * 2 * case.tokens * (full if kind == DENSE else elements)
        rows.append(
            {
                **case._asdict(),
                "contestant": name,
                "kind": kind,
                "ms": rounded(ms),
                "p25": rounded(timing.quantile(0.25)),
                "p75": rounded(timing.quantile(0.75)),
                "samples": len(timing.samples),
                "gflops": rounded(flops / ms / 1e6),
            }
        )
    best = {kind: min((r for r in rows if r["kind"] == kind), key=_ms, default=None) for kind in (DENSE, SPARSE)}
    field, name = case.usual
    usual = next((row for row in rows if row["contestant"] == name), None)
    for row in (row for row in rows if row["kind"] == OURS):
        for name, peer in (("dense", best[DENSE]), (field, usual), ("sparse", best[SPARSE])):
            row[f"vs_{name}"] = None if peer is None else rounded(peer["ms"] / row["ms"])
        row["best_dense"], row["best_sparse"] = (None if p is None else p["contestant"] for p in best.values())
        if (dense := best[DENSE]) is not None:
            row["rate_vs_dense"] = rounded(row["gflops"] / dense["gflops"])
    return rows


def rounded(number: float) -> float:
    """Return four digits of a number: no measurement here has more."""
    return float(f"{number:.4g}")


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write a whole file: it is there complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}.tmp")
    aside.write_text("".join(json.dumps(row) + "\n" for row in rows))
    aside.replace(path)


def case_of(row: Row) -> AnyCase:
    """Return what a row is about."""
    if "images" in row:
        return ConvCase(**{field: row[field] for field in ConvCase._fields})
    return Case(**{field: row[field] for field in Case._fields})


class Race:
    """The rows of a file, to be asked by case and contestant."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = list(rows)
        self._found = {(case_of(row), row["contestant"]): row for row in self.rows if "ms" in row}

    def row(self, case: AnyCase, contestant: str = "sparsekern") -> Row | None:
        """Return what was measured, or None."""
        return self._found.get((case, contestant))

    def cases(self) -> list[AnyCase]:
        """Return the cases that were measured, in the order of the file."""
        return list(dict.fromkeys(case for case, _ in self._found))

    def ratio(self, case: AnyCase, contestant: str, against: Iterable[str]) -> float | None:
        """Return how many times faster a contestant is than the fastest of others, or None if not measured."""
        row = self.row(case, contestant)
        peers = [peer["ms"] for name in against if (peer := self.row(case, name)) is not None]
        return min(peers) / row["ms"] if row is not None and peers else None


def _ms(row: Row) -> float:
    return float(row["ms"])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
