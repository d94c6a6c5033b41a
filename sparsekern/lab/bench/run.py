"""The races of ``sparsekern bench``: answers are checked first, then the contestants take turns."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
from torch import nn

from sparsekern.analysis.clock import Clock
from sparsekern.analysis.layer_race import (
    CALM,
    Contestant,
    LayerInput,
    dense_contestant,
    sparse_contestant,
    what_is_wrong,
)
from sparsekern.errors import InputError
from sparsekern.lab.bench.peers import SPARSELAB, SparseLabLayer, absent, why_one_thread
from sparsekern.lab.bench.request import DTYPES, Request, Sizes, usable_cores
from sparsekern.lab.bench.subjects import Subject, subjects
from sparsekern.nn import BlockSparse, SparseLinear
from sparsekern.nn.converters import converter_of

DENSE = "dense"

FORWARD, STEP = "forward", "forward + backward"

ROUNDS = 30
"""Rounds of a race at most."""

Row = dict[str, Any]


@dataclass
class Report:
    """What was measured.

    Attributes:
        rows: one for each contestant of each race: ``layer``, ``count``, ``pass``, ``dtype``, ``threads``,
            ``sparsity``, ``contestant``, ``ms``, ``p25``, ``p75``, ``samples``, ``vs_dense``.
        notes: sentences about what was not raced.
        busy: a sentence if the machine was too busy to believe the rows, or None.
    """

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    busy: str | None = None

    def note(self, text: str) -> None:
        """Add a sentence, once."""
        if text not in self.notes:
            self.notes.append(text)


Advance = Callable[[str, int, int], object]
"""Function of what is raced now, the number of races done, and that of all."""


def run_bench(request: Request, advance: Advance) -> Report:
    """Run the races of a request.

    Args:
        request: what is raced.
        advance: told before each race.

    Raises:
        ValueError: the model cannot be made, or no sparse layer can.
    """
    report = Report()
    load, before = _load(), torch.get_num_threads()
    layers = subjects(request)
    passes = (STEP,) if request.model is not None else (FORWARD, STEP)
    cases = [*product(layers, request.dtype, request.sparsity)]
    races = len(cases) * len(request.threads) * len(passes)
    one_thread = _one_thread(request, report)
    done = 0
    try:
        for subject, dtype, sparsity in cases:
            entered = Entered(request, report, subject, dtype, sparsity)
            for threads, which in product(request.threads, passes):
                advance(f"{subject.title}, {sparsity:.0%}", done, races)
                torch.set_num_threads(threads)
                taking_part = {
                    name: contestant
                    for name, contestant in entered.contestants.items()
                    if not (name == SPARSELAB and one_thread and threads > 1)
                }
                report.rows += entered.race(taking_part, which, threads)
                done += 1
            torch.set_num_threads(before)
    finally:
        torch.set_num_threads(before)
    if not any(row["contestant"] not in (DENSE, SPARSELAB) for row in report.rows):
        raise InputError(f"nothing could be raced: {'; '.join(report.notes)}", parameter="block")
    report.busy = _busy(load, request, report.rows)
    return report


class Entered:
    """The contestants of a layer at one sparsity whose answers are right.

    Args:
        request: what is raced.
        report: gets a note about each that is not.
        subject: the dense layer.
        dtype: its name.
        sparsity: of the sparse layers.
    """

    def __init__(self, request: Request, report: Report, subject: Subject, dtype: str, sparsity: float) -> None:
        self.request, self.subject, self.dtype, self.sparsity = request, subject, dtype, sparsity
        kind = DTYPES[dtype]
        self.given = replace(subject.given, x=subject.given.x.to(kind), autocast=None)
        dense = copy.deepcopy(subject.layer).to(kind)
        self.contestants: dict[str, Contestant] = {}
        for name, make in self._makers(dense).items():
            where = f"{subject.title}, {dtype}, {sparsity:.0%}: {name}"
            try:
                contestant = make()
                wrong = what_is_wrong(contestant, self.given, subject.multiply_adds)
            except InputError as error:
                report.note(f"{where} is not raced: {error}")
                continue
            if wrong is None:
                self.contestants[name] = contestant
            else:
                report.note(f"{where} is wrong and not raced: {wrong}")
        if DENSE not in self.contestants:
            self.contestants = {}

    def _makers(self, dense: nn.Module) -> dict[str, Callable[[], Contestant]]:
        makers: dict[str, Callable[[], Contestant]] = {DENSE: lambda: dense_contestant(dense)}
        for block in self.request.block:
            makers[block_name(block)] = lambda block=block: sparse_contestant(self._sparse(dense, block))  # type: ignore[misc]
        if self.request.peers and absent() is None and type(dense) is nn.Linear and self.dtype == "float32":
            makers[SPARSELAB] = lambda: self._sparselab(dense)
        return makers

    def _sparse(self, dense: nn.Module, block: Sizes) -> BlockSparse:
        converter = converter_of(dense)
        assert converter is not None
        options: dict[str, Any] = {"block_size": block, "sparsity": self.sparsity, "init": "random", "seed": 0}
        options |= {"device": self.given.x.device, "dtype": self.given.x.dtype}
        layer = converter.sparse(**converter.arguments(dense), **options)
        layer.set_dense_class(dense)
        return layer

    def _sparselab(self, dense: nn.Module) -> Contestant:
        """Return SparseLab's layer with as many single weights, at random places."""
        ours = self._sparse(dense, (1, 1))
        assert isinstance(ours, SparseLinear)
        return SparseLabLayer(ours.dense_weight(), ours.bias).contestant()

    def race(self, contestants: dict[str, Contestant], which: str, threads: int) -> Iterator[Row]:
        """Race some of the contestants; yield their rows."""
        given: LayerInput = self.given
        calls = {
            name: contestant.step_call(given) if which == STEP else contestant.forward_call(given)
            for name, contestant in contestants.items()
        }
        timings, errors = Clock(given.x.device).race(calls, ROUNDS, self.request.seconds)
        for error in errors.values():
            raise error
        for name, timing in timings.items():
            yield {
                "layer": self.subject.title,
                "count": self.subject.count,
                "pass": which,
                "dtype": self.dtype,
                "threads": threads,
                "sparsity": self.sparsity,
                "contestant": name,
                "ms": timing.median,
                "p25": timing.quantile(0.25),
                "p75": timing.quantile(0.75),
                "samples": len(timing.samples),
                "vs_dense": timings[DENSE].median / timing.median,
            }


def block_name(block: Sizes) -> str:
    """Return the name of the contestant with blocks of a size, such as "32x32"."""
    return f"{block[0]}x{block[1]}"


def _one_thread(request: Request, report: Report) -> bool:
    """Return whether a peer may have one thread only, and note why; note too which peer takes no part."""
    if not request.peers:
        return False
    if (missing := absent()) is not None:
        report.note(missing)
        return False
    if request.device.type != "cpu":
        report.note(f"{SPARSELAB} runs on a CPU only and takes no part")
        return False
    why = why_one_thread()
    if why is not None and max(request.threads) > 1:
        report.note(why)
    return why is not None


def _load() -> float | None:
    """Return the load average of the last minute, or None on a system without one."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _busy(load: float | None, request: Request, rows: list[Row]) -> str | None:
    """Return in a sentence why the machine was too busy to believe the rows, or None."""
    reasons = []
    if load is not None and load > usable_cores() - max(request.threads) + 0.5:
        cores = usable_cores()
        reasons.append(f"the load average was {load:.1f} on {cores} core{'s' * (cores > 1)} before the race began")
    spread = max(((row["p75"] - row["p25"]) / row["ms"] for row in rows if row["contestant"] == DENSE), default=0.0)
    if spread > CALM:
        reasons.append(f"the quartiles of the dense layer are up to {spread:.0%} of its median apart")
    if not reasons:
        return None
    return f"the machine is too busy to believe these figures ({' and '.join(reasons)}); repeat it when it is idle"
