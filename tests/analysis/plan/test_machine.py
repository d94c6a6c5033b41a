"""Seconds of operators from curves and from published peaks, against numbers worked out by hand."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.analysis.plan import DEVICES, Machine, Step, cache_file, measurement, trace
from sparsekern.analysis.plan.machine import ATTENTION, DENSE, OPTIMIZER, OTHER, SPARSE, Operation, value
from sparsekern.errors import InputError

CURVES = {
    "sparse linear 16x16 forward@64": [(1.0, 1e-9), (100.0, 1e-7)],
    "sparse linear 16x16 forward@1024": [(1.0, 4e-9), (100.0, 4e-7)],
    "sparse linear 64x64 forward@64": [(1.0, 7e-9)],
    "sparse linear 16x16 backward@64": [(1.0, 9e-9)],
    "mm": [(10.0, 2e-9)],
    "attention forward": [(64.0, 3e-9)],
    "qkv attention forward": [(64.0, 1e-9)],
    "add": [(1000.0, 5e-9)],
    "gelu": [(1000.0, 6e-9)],
    "_fused_adamw_": [(1000.0, 8e-9)],
}
MACHINE = Machine({"threads": 1}, call=1e-5, sparse_call=1e-4, curves=CURVES)


def test_a_curve_is_a_line_on_logarithmic_axes():
    points = [(1.0, 10.0), (100.0, 1000.0)]
    assert [value(points, x) for x in (0.1, 1.0, 10.0, 100.0, 1e6)] == pytest.approx([10, 10, 100, 1000, 1000])


@pytest.mark.parametrize(
    ("operation", "seconds"),
    [
        (Operation(OTHER, "", 0), 1e-5),
        (Operation(SPARSE, "sparse linear 16x16 forward", 1000, 10.0, 64), 1e-4 + 1000 * 1e-8),
        (Operation(SPARSE, "sparse linear 16x16 forward", 1000, 10.0, 256), 1e-4 + 1000 * 2e-8),  # between two tokens
        (Operation(SPARSE, "sparse linear 48x48 forward", 1000, 10.0, 64), 1e-4 + 1000 * 7e-9),  # the nearest block
        (Operation(SPARSE, "sparse linear 16x16 dx", 1000, 10.0, 64), 1e-4 + 1000 * 1e-8),
        (Operation(SPARSE, "sparse linear 16x16 dvalues", 1000, 10.0, 64), 1e-4 + 1000 * 9e-9),
        (Operation(DENSE, "mm", 1000, 5.0), 1e-5 + 1000 * 2e-9),
        (Operation(ATTENTION, "attention forward causal", 1000, 64.0), 1e-5 + 1000 * 3e-9),
        (Operation(ATTENTION, "qkv attention forward", 1000, 64.0), 1e-5 + 1000 * 1e-9),
        (
            Operation(ATTENTION, "qkv attention forward causal", 1000, 64.0),
            1e-5 + 1000 * 3e-9,
        ),  # PyTorch's
        (Operation(OTHER, "gelu", 9, bytes=1000), 1e-5 + 1000 * 6e-9),
        (Operation(OTHER, "mul", 9, bytes=1000), 1e-5 + 1000 * 5e-9),
        (Operation(OTHER, "an operator that nobody measured", 9, bytes=1000), 1e-5 + 1000 * 5e-9),
        (Operation(OPTIMIZER, "_fused_sgd_", 9, bytes=1000), 1e-5 + 1000 * 8e-9),
    ],
)
def test_seconds_of_a_measured_machine(operation, seconds):
    assert MACHINE.seconds(operation) == pytest.approx(seconds)


def test_seconds_at_published_peaks():
    h200 = DEVICES["h200"]
    assert h200.seconds(Operation(DENSE, "mm", 1, flops=989 * 10**12)) == pytest.approx(1.0)
    assert h200.seconds(Operation(OTHER, "add", 1, bytes=48 * 10**11)) == pytest.approx(1.0)
    assert h200.seconds(Operation(SPARSE, "sparse linear 64x64 forward", 1, gathered=8 * 10**12)) == pytest.approx(1.0)
    assert h200.seconds(Operation(OTHER, "add", 1)) == h200.launch
    assert h200.seconds(Operation(OTHER, "", 0)) == 0
    assert replace(h200, dtype="ieee").seconds(Operation(DENSE, "mm", 1, flops=67 * 10**12)) == pytest.approx(1.0)
    assert DEVICES["rtx4090"].seconds(Operation(DENSE, "mm", 1, flops=1652 * 10**11)) == pytest.approx(1.0)
    assert (h200.sends(8), h200.sends(9)) == (450e9, 50e9)


def test_a_measurement_is_kept_and_read_again(tmp_path):
    file = tmp_path / "new" / "machine.json"
    assert Machine.load(file) is None
    MACHINE.save(file)
    assert Machine.load(file) == MACHINE
    assert [path.name for path in file.parent.iterdir()] == ["machine.json"]
    for damaged in ("", "[]", '{"format": 0}', '{"format": 2}', file.read_text().replace('"format": 2', '"format": 1')):
        file.write_text(damaged)
        with pytest.raises(InputError, match="is no measurement of this version; run sparsekern plan --measure"):
            Machine.load(file)


def test_the_cache_is_where_the_platform_wants_it(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    first = cache_file("AMD EPYC/7 (R)", 2, "2.13.0+cpu", "0.1.0")
    assert first.parent == tmp_path / "sparsekern" and "/" not in first.name and "2.13.0+cpu" in first.name
    assert cache_file("AMD EPYC/7 (R)", 1, "2.13.0+cpu", "0.1.0") != first
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_file("x", 1, "1", "1").parent.parts[-2:] == (".cache", "sparsekern")
    monkeypatch.setattr("sys.platform", "darwin")
    assert cache_file("x", 1, "1", "1").parent.parts[-3:] == ("Library", "Caches", "sparsekern")
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    assert cache_file("x", 1, "1", "1").parent == tmp_path / "sparsekern"


@pytest.fixture
def small(monkeypatch):
    """A measurement of small sizes: every operator, in a second."""
    monkeypatch.setattr(measurement, "BLOCKS", (1, 16))
    monkeypatch.setattr(measurement, "DENSITIES", (0.5,))
    monkeypatch.setattr(measurement, "CONV_DENSITIES", (0.5,))
    monkeypatch.setattr(measurement, "LINEARS", ((8, 32),))
    monkeypatch.setattr(measurement, "CONVS", ((4, 16),))
    monkeypatch.setattr(measurement, "MM", ((8, 16),))
    monkeypatch.setattr(measurement, "CONVOLUTIONS", ((3, 8, 3),))
    monkeypatch.setattr(measurement, "CONTEXTS", (16,))
    monkeypatch.setattr(measurement, "SIZES", (2**15,))
    monkeypatch.setattr(measurement, "ROTATED", 2**15)
    monkeypatch.setattr(measurement, "IMAGES", 1)
    monkeypatch.setattr(measurement, "ROUNDS", 1)
    monkeypatch.setattr(measurement, "SHORT_ROUNDS", 1)


def test_a_measurement_times_every_kind_of_operator(small):
    told = []
    machine = measurement.measure({"threads": 1}, told.append, time.perf_counter)
    assert told == sorted(told) and sorted({*told}) == [number / 5 for number in range(6)]
    assert machine.call > 0 and machine.sparse_call >= machine.call
    with torch.device("meta"):
        model = sk.sparsify_(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)), 0.5, 16)
    x = torch.empty(8, 64, device="meta")
    found = trace(Step(model, x, lambda m, x: m(x).sum(), lambda m: torch.optim.AdamW(m.parameters(), fused=True)))
    assert all(machine.seconds(op) > 0 for calls in (found.forward, found.backward, found.update) for op in calls)
    kinds = {name.partition("@")[0] for name in machine.curves}
    assert {"sparse conv2d 1x1 backward", "sparse linear 16x16 forward", "mm", "conv backward", "gelu"} <= kinds
    assert {"attention backward causal", "qkv attention forward", "qkv attention backward causal"} <= kinds
    assert {"native_batch_norm_backward", "_fused_adamw_", "_fused_sgd_"} <= kinds
