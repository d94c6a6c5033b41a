"""SparseLab and SparseProp in the race: libraries made up here with their layouts, absent, or in the way."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy
import pytest
import torch
from torch import nn

from bench.cpu.peers import SPARSEPROP, makers, sparselab, sparseprop
from bench.cpu.scene import make_scene
from bench.gpu.peers import NotSupported
from bench.gpu.scene import Judge
from sparsekern.analysis.layer_race import LayerInput, what_is_wrong
from sparsekern.lab.bench import run
from sparsekern.lab.bench.run import SPARSELAB, sparselab_layer
from tests.bench_rows import TINY as CASE
from tests.lab.bench.test_run import raced

ROOM = 2
"""Slots of padding after each row."""


def from_dense(weight):
    """Return rows of values with room behind each, as SparseLab stores them."""
    rows = [row.nonzero().flatten() for row in weight]
    counts = [len(row) for row in rows]
    starts = numpy.cumsum([0] + [count + ROOM for count in counts])
    values, cols = numpy.zeros(starts[-1], "float32"), numpy.full(starts[-1], -1)
    for number, (row, start) in enumerate(zip(rows, starts, strict=False)):
        values[start : start + len(row)] = weight[number, row].numpy()
        cols[start : start + len(row)] = row.numpy()
    return SimpleNamespace(values=values, col_indices=cols, row_start=starts, row_nnz=numpy.array(counts))


class MadeUp(nn.Module):
    """A layer that computes as SparseLab's."""

    def __init__(self, inputs, outputs, bias=True, sparsity=0.9):
        super().__init__()
        self.sizes, self._csr, self._values = (outputs, inputs), None, None
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, x):
        csr = self._csr
        rows = torch.tensor([r for r, n in enumerate(csr.row_nnz) for _ in range(n)])
        slots = torch.tensor([csr.row_start[r] + i for r, n in enumerate(csr.row_nnz) for i in range(n)])
        cols = torch.tensor(csr.col_indices)[slots]
        weight = torch.zeros(self.sizes).index_put((rows, cols), self._values[slots])
        return nn.functional.linear(x, weight, self.bias)


@pytest.fixture
def installed(monkeypatch):
    made = SimpleNamespace(SparseLinear=MadeUp, layout=SimpleNamespace(from_dense=from_dense))
    monkeypatch.setitem(sys.modules, "sparselab", made)
    monkeypatch.setattr(run, "find_spec", lambda name: object())
    monkeypatch.setattr(run, "openmp_runtimes", lambda: {"/torch/lib/libgomp.so.1"})
    return made


def test_its_answers_are_checked_like_ours(installed):
    weight = torch.randn(6, 8) * (torch.rand(6, 8, generator=torch.Generator().manual_seed(0)) > 0.5)
    bias, x = torch.randn(6), torch.randn(5, 8)
    contestant, _ = sparselab_layer(weight, bias)
    torch.testing.assert_close(contestant.forward(x), x @ weight.T + bias)
    assert what_is_wrong(contestant, LayerInput(x), 1) is None
    wrong = replace(contestant, forward=lambda x: 1.01 * contestant.forward(x))
    assert "y is off" in str(what_is_wrong(wrong, LayerInput(x), 1))


def test_it_races_linear_layers_in_float32(installed):
    report, _ = raced(peers=True, sparsity=(0.5,), dtype=("float32", "bfloat16"))
    its = [row for row in report.rows if row["contestant"] == SPARSELAB]
    assert {(row["layer"][:6], row["dtype"]) for row in its} == {("linear", "float32")} and len(its) == 2
    assert not report.notes


@pytest.mark.parametrize(
    ("runtimes", "said"), [({"/a/libgomp.so", "/b/libomp.so"}, "brings a second"), (None, "may bring a second")]
)
def test_with_a_second_openmp_runtime_it_has_one_thread(installed, monkeypatch, threads, runtimes, said):
    threads(1)
    monkeypatch.setattr(run, "openmp_runtimes", lambda: runtimes)
    report, _ = raced(peers=True, sparsity=(0.5,), conv=(), threads=(1, 2))
    assert {row["threads"] for row in report.rows if row["contestant"] == SPARSELAB} == {1}
    assert {row["threads"] for row in report.rows} == {1, 2}
    (note,) = report.notes
    assert said in note and "one thread only" in note


def test_one_that_is_absent_is_named(monkeypatch):
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    report, _ = raced(peers=True, sparsity=(0.5,), conv=())
    assert report.notes == ["SparseLab is not installed and takes no part: pip install sparselab"]
    with pytest.raises(NotSupported, match="not installed"):
        sparselab(make_scene(CASE), "fwd")


def test_one_that_runs_on_a_cpu_only_is_named_on_another_device(installed):
    report = run.Report()
    request = SimpleNamespace(peers=True, device=torch.device("cuda"), threads=(1,))
    assert run._one_thread(request, report) is False and "runs on a CPU only" in report.notes[0]


def test_the_runtimes_of_this_process():
    found = run.openmp_runtimes()
    assert found is None or all(path.startswith("/") and "omp" in path for path in found)
    text = "7f-8f r-xp 0 08:01 5  /a b/libc.so\n7f r 0 6 /x/libgomp-24e2ab19.so.1.0.0\n7f r 0 /y/libiomp5.so\n"
    assert set(run.RUNTIME.findall(text)) == {"/x/libgomp-24e2ab19.so.1.0.0", "/y/libiomp5.so"}


@pytest.mark.parametrize("op", ["fwd", "step"])
def test_it_takes_part_in_the_race_of_the_kernels(installed, monkeypatch, threads, op):
    threads(1)
    scene = make_scene(CASE._replace(block=1))
    contestant = sparselab(scene, op)
    assert Judge(scene, "step", tf32=False).wrong(contestant.answer(contestant.run()), by_element=True) is None
    threads(2)
    monkeypatch.setattr(run, "openmp_runtimes", lambda: None)
    with pytest.raises(NotSupported, match="one thread only"):
        sparselab(scene, op)


class MadeUpRows(nn.Module):
    """A layer that computes as SparseProp's: compressed rows of what is not zero."""

    def __init__(self, weight):
        super().__init__()
        rows = weight.to_sparse_csr()
        self.W_val = nn.Parameter(rows.values())
        self.W_idx = (rows.crow_indices().int(), rows.col_indices().int())
        self.shape, self.at = weight.shape, weight.nonzero(as_tuple=True)

    def forward(self, x):
        return nn.functional.linear(x, torch.zeros(self.shape).index_put(self.at, self.W_val))


@pytest.mark.parametrize("op", ["fwd", "step"])
def test_sparseprop_takes_part_where_it_is_installed(monkeypatch, op):
    case = CASE._replace(block=1, op=op)
    monkeypatch.setattr("bench.cpu.peers.importlib.util.find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "sparseprop", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "sparseprop.modules", SimpleNamespace(SparseLinear=MadeUpRows))
    scene = make_scene(case)
    contestant = makers(case)[SPARSEPROP](scene, op)
    assert Judge(scene, "step", tf32=False).wrong(contestant.answer(contestant.run()), by_element=True) is None


def test_sparseprop_is_named_where_it_is_absent(monkeypatch):
    monkeypatch.setattr("bench.cpu.peers.importlib.util.find_spec", lambda name: None)
    with pytest.raises(NotSupported, match="SparseProp is not installed; pip install sparseprop"):
        sparseprop(make_scene(CASE), "fwd")
