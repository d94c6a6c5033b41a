"""The measurements of GSE's width and of the masked twin, rehearsed on tiny layers: their lines, not their times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import sparsekern as sk
from bench import masked, width

RESULTS = Path(__file__).parent.parent / "bench/results"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_rehearsal_of_the_widths(tmp_path, capsys):
    out = tmp_path / "width.jsonl"
    width.main(["--widths", "128", "256", "--blocks", "16", "--tokens", "4", "2", "--rounds", "1", "--out", str(out)])
    rows = lines(out)
    assert {row["what"] for row in rows} == {"step", "gse update", "rigl update", "dense step"}
    assert all(row["ms"] > 0 for row in rows if row.get("what") in ("step", "dense step") and "ms" in row)
    assert len([row for row in rows if "exponent" in row]) == 4 + 2
    before = out.with_suffix(".png").stat().st_mtime_ns
    width.main(["--draw", "--out", str(out)])
    assert lines(out) == rows and out.with_suffix(".png").stat().st_mtime_ns > before
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG") and "width^" in capsys.readouterr().out


def test_the_exponent_of_a_power():
    rows = [{"block": 1, "tokens": 4, "what": "step", "width": w, "ms": 3e-3 * w**1.5} for w in (512, 1024, 4096)]
    rows.append({"block": 1, "tokens": 4, "what": "gse update", "width": 512, "ms": 1.0})
    slopes = {row["what"]: row["exponent"] for row in width.exponents(rows)}
    assert slopes == {"step": pytest.approx(1.5, abs=1e-3), "gse update": None}


def test_elements_are_a_constant_multiple_of_the_features(monkeypatch):
    layers = []
    monkeypatch.setattr(width, "training", lambda layer, *_: layers.append(layer))
    for features in (512, 1024):
        for block in (1, 16):
            width.contestants(features, block, 4)["step"]()
            assert layers[-1].topology.elements() == width.PER_FEATURE * 2 * features


def test_what_would_take_long_is_left_out(monkeypatch):
    monkeypatch.setattr(width, "LONG", 1e-9)
    rows = width.measure((128, 256), (16,), 4, 1, peers=True)
    assert [(row["width"], row["what"]) for row in rows] == [
        *((128, what) for what in ("step", "gse update", "rigl update", "dense step")),
        *((256, what) for what in ("step", "gse update")),
    ]


def test_a_rehearsal_of_the_masked_twin(tmp_path, capsys, monkeypatch):
    flushed: list[bool] = []  # the switch is of the whole process: other tests here need subnormal numbers
    monkeypatch.setattr(torch, "set_flush_denormal", flushed.append)
    out = tmp_path / "masked.jsonl"
    arguments = ["--widths=64", "--blocks", "1", "16", "--sparsities=0.75", "--tokens=4", "--side=4", "--rounds=1"]
    masked.main([*arguments, "--out", str(out)])
    assert flushed == [True]
    rows = lines(out)
    assert [row["block"] for row in rows] == [1, 16] and all(row["vs_masked"] > 0 for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_the_masked_twin_computes_the_same():
    models = masked.networks(64, 4, 16, 0.75)
    x = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(models["masked"](x), models["sparse"](x))
    for model in (models["masked"], models["sparse"]):
        model(x).square().sum().backward()
    layer, twin = models["sparse"].hidden1, models["masked"].hidden1
    dense = sk.topology.dense.to_dense(layer.topology, layer.values.grad)
    torch.testing.assert_close(twin.weight.grad, dense)


@pytest.mark.parametrize("name", ["width", "masked"])
def test_the_committed_runs(name):
    rows = lines(RESULTS / f"{name}.jsonl")
    assert rows and all(row["device"] for row in rows if "exponent" not in row)
    if name == "width":
        slopes = [row["exponent"] for row in rows if "exponent" in row and row["what"] in ("step", "gse update")]
        assert len(slopes) == 8
