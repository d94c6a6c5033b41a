"""The races of ``sparsekern bench``: answers are checked first, then the contestants take turns."""

from __future__ import annotations

import copy
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.analysis.clock import race
from sparsekern.analysis.layer_race import (
    CALM,
    Contestant,
    LayerInput,
    dense_contestant,
    sparse_contestant,
    trained,
    what_is_wrong,
)
from sparsekern.errors import InputError
from sparsekern.lab.bench.request import DTYPES, Request, Sizes, Subject, subjects, usable_cores
from sparsekern.nn import BlockSparse, SparseLinear
from sparsekern.nn.converters import converter_of

RUNTIME = re.compile(r"/\S*lib(?:gomp|omp|iomp5)\S*")
"""A file of an OpenMP runtime: that of GCC, of LLVM or of Intel."""

SPARSELAB = "SparseLab"


def openmp_runtimes() -> set[str] | None:
    """Return the files of the OpenMP runtimes in this process; None if the system does not say."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    return set(RUNTIME.findall(maps))


def why_one_thread() -> str | None:
    """Return in a sentence why SparseLab is raced on one thread only, or None; loads it."""
    import_module("sparselab")
    runtimes = openmp_runtimes()
    if runtimes is None:
        return f"{SPARSELAB} may bring a second OpenMP runtime, which this system does not show: one thread only"
    if len(runtimes) > 1:
        return f"{SPARSELAB} brings a second OpenMP runtime into the process: it is raced on one thread only"
    return None


def absent() -> str | None:
    """Return in a sentence that SparseLab is not installed, or None."""
    if find_spec("sparselab") is None:
        return f"{SPARSELAB} is not installed and takes no part: pip install sparselab"
    return None


def sparselab_layer(weight: Tensor, bias: Tensor | None) -> tuple[Contestant, tuple[Tensor, Tensor, Tensor]]:
    """Return a layer of SparseLab, and row, column and slot ``(n,)`` of each stored weight.

    Args:
        weight: ``(out, in)`` float32 on the CPU; what is zero is not stored.
        bias: ``(out,)`` or None.
    """
    sparselab: Any = import_module("sparselab")
    outputs, inputs = weight.shape
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Sparse CSR tensor support is in beta.*")
        module = sparselab.SparseLinear(inputs, outputs, bias=bias is not None, sparsity=0.0)
        csr = sparselab.layout.from_dense(weight.detach())
    module._csr, module._values = csr, nn.Parameter(torch.from_numpy(csr.values))
    if bias is not None:
        module.bias = nn.Parameter(bias.detach().clone())
    counts = torch.tensor(csr.row_nnz, dtype=torch.int64)
    rows = torch.arange(outputs).repeat_interleave(counts)
    firsts = torch.tensor(csr.row_start, dtype=torch.int64)[:outputs]
    within = torch.arange(len(rows)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    slots = firsts.repeat_interleave(counts) + within  # those between are padding
    cols = torch.tensor(csr.col_indices, dtype=torch.int64)[slots]

    def exact(x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        w, b = (None if t is None else t.detach().double().requires_grad_() for t in (weight, bias))
        dense = Contestant(lambda x: nn.functional.linear(x, w, b), trained(w, b))  # type: ignore[arg-type]
        y, dx, dweight, *dbias = dense.step_call(LayerInput(x), dy)()
        dvalues = dweight.new_zeros(len(module._values))
        dvalues[slots] = dweight[rows, cols]
        return y, dx, dvalues, *dbias

    parameters = (module._values,) if module.bias is None else (module._values, module.bias)
    return Contestant(module, parameters, exact), (rows, cols, slots)


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


Entered = tuple[dict[str, Contestant], LayerInput]
"""Contestants by name, and their input."""

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
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    before = torch.get_num_threads()
    layers = subjects(request)
    passes = (STEP,) if request.model is not None else (FORWARD, STEP)
    cases = [*product(layers, request.dtype, request.sparsity)]
    races = len(cases) * len(request.threads) * len(passes)
    one_thread = _one_thread(request, report)
    done = 0
    try:
        for subject, dtype, sparsity in cases:
            entered, given = _contestants(request, report, subject, dtype, sparsity)
            for threads, which in product(request.threads, passes):
                advance(f"{subject.title}, {sparsity:.0%}", done, races)
                torch.set_num_threads(threads)
                calls = {
                    name: contestant.step_call(given) if which == STEP else contestant.forward_call(given)
                    for name, contestant in entered.items()
                    if not (name == SPARSELAB and one_thread and threads > 1)
                }
                timings = race(calls, given.x.device, ROUNDS, request.seconds)
                where = {"layer": subject.title, "count": subject.count, "pass": which, "dtype": dtype}
                where |= {"threads": threads, "sparsity": sparsity}
                for name, timing in timings.items():
                    times = {"ms": timing.median, "p25": timing.quantile(0.25), "p75": timing.quantile(0.75)}
                    times |= {"samples": len(timing.samples), "vs_dense": timings[DENSE].median / timing.median}
                    report.rows.append({**where, "contestant": name, **times})
                done += 1
            torch.set_num_threads(before)
    finally:
        torch.set_num_threads(before)
    if not any(row["contestant"] not in (DENSE, SPARSELAB) for row in report.rows):
        raise InputError(f"nothing could be raced: {'; '.join(report.notes)}", parameter="block")
    report.busy = _busy(load, request, report.rows)
    return report


def _contestants(request: Request, report: Report, subject: Subject, dtype: str, sparsity: float) -> Entered:
    """Return the contestants of a layer whose answers are right, and their input; the report says what is not raced."""
    given = replace(subject.given, x=subject.given.x.to(DTYPES[dtype]), autocast=None)
    dense = copy.deepcopy(subject.layer).to(DTYPES[dtype])
    makers: dict[str, Callable[[], Contestant]] = {DENSE: lambda: dense_contestant(dense)}
    for block in request.block:
        makers["{}x{}".format(*block)] = lambda b=block: sparse_contestant(_sparse(dense, b, given.x, sparsity))  # type: ignore[misc]
    if request.peers and absent() is None and type(dense) is nn.Linear and dtype == "float32":
        makers[SPARSELAB] = lambda: _sparselab(dense, given.x, sparsity)
    found: dict[str, Contestant] = {}
    for name, make in makers.items():
        where = f"{subject.title}, {dtype}, {sparsity:.0%}: {name}"
        try:
            contestant = make()
            wrong = what_is_wrong(contestant, given, subject.multiply_adds)
        except InputError as error:
            report.note(f"{where} is not raced: {error}")
            continue
        if wrong is None:
            found[name] = contestant
        else:
            report.note(f"{where} is wrong and not raced: {wrong}")
    return (found if DENSE in found else {}), given


def _sparse(dense: nn.Module, block: Sizes, x: Tensor, sparsity: float) -> BlockSparse:
    converter = converter_of(dense)
    assert converter is not None
    options: dict[str, Any] = {"block_size": block, "sparsity": sparsity, "init": "random", "seed": 0}
    layer = converter.sparse(**converter.arguments(dense), **options, device=x.device, dtype=x.dtype)
    layer.set_dense_class(dense)
    return layer


def _sparselab(dense: nn.Module, x: Tensor, sparsity: float) -> Contestant:
    """Return SparseLab's layer with as many single weights, at random places."""
    ours = _sparse(dense, (1, 1), x, sparsity)
    assert isinstance(ours, SparseLinear)
    return sparselab_layer(ours.dense_weight(), ours.bias)[0]


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


def _busy(load: float, request: Request, rows: list[Row]) -> str | None:
    """Return in a sentence why the machine was too busy to believe the rows, or None."""
    reasons = []
    if load > usable_cores() - max(request.threads) + 0.5:
        cores = usable_cores()
        reasons.append(f"the load average was {load:.1f} on {cores} core{'s' * (cores > 1)} before the race began")
    spread = max(((row["p75"] - row["p25"]) / row["ms"] for row in rows if row["contestant"] == DENSE), default=0.0)
    if spread > CALM:
        reasons.append(f"the quartiles of the dense layer are up to {spread:.0%} of its median apart")
    if not reasons:
        return None
    return f"the machine is too busy to believe these figures ({' and '.join(reasons)}); repeat it when it is idle"
