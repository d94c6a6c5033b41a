"""The benches of Sparse-IFT on a small scale, and their tables by hand."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from bench import sparse_ift_claim, sparse_ift_table
from bench.sparse_ift_table import Network, described, kept_bytes, rows
from sparsekern.lab.data import Dataset


def test_the_rows_of_a_small_network():
    x = torch.randn(4, 64)

    def build(width):
        return nn.Sequential(
            nn.Linear(64, width(128)), nn.ReLU(), nn.Linear(width(128), width(128)), nn.Linear(width(128), 5)
        )

    found = list(rows(Network(build, x[:1], x, 16, ("0", "3")), [0.5, 0.9], repeats=1))
    assert [(r["transform"], r["sparsity"]) for r in found if r["transform"] == "dense"] == [("dense", 0.0)] * 2
    asked = 64 * 128 + 128 * 128 + 128 * 5
    assert {r["asked"] for r in found if "asked" in r} == {asked}
    refused = [r for r in found if "refused" in r]
    assert [(r["transform"], r["sparsity"]) for r in refused] == [("wide", 0.9)]
    for row in found:
        if row.get("match") == "network" and "error" in row:
            assert abs(row["multiply_adds"] - asked) <= 128 and row["cpu_ms"] > 0
    text = sparse_ift_table.table([{"network": "small"} | r for r in found])
    assert len(text.splitlines()) == 2 + 1 + 8 and "| small | wide (sparse layers matched) | 90% |" in text


def test_what_a_forward_keeps():
    """The input of the first layer, and the output of the ReLU; weights are not counted."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    x = torch.randn(5, 8)
    assert kept_bytes(model, x) == 4 * 5 * (8 + 16)
    assert described(model, Network(lambda width: model, x, x, 4, ()))["parameters"] == 9 * 16 + 17 * 3


def line(sparsity, method, seed, last, graphs=()):
    return {
        "sparsity": sparsity,
        "method": method,
        "seed": seed,
        "accuracy": [50.0, last],
        "parameters": 1000,
        "multiply_adds": 900,
        "cpu_ms_per_step": 1.5,
        "graphs": list(graphs),
    }


def test_the_table_of_the_claim_by_hand():
    lines = [line(0.0, None, 0, 80.0), line(0.0, None, 1, 82.0)]
    lines += [line(0.5, "set", 0, 81.0), line(0.5, "set", 1, 85.0)]
    text = sparse_ift_claim.table(lines).splitlines()
    assert text[2].startswith("| dense |  | 81.00 % | 80.00 to 82.00 |  | 1,000 | 900 |")
    assert "| 83.00 % | 81.00 to 85.00 | +2.00 ± 1.00 |" in text[3]  # differences 1 and 3


def test_the_claim_runs_and_is_drawn(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    images, labels = torch.rand(256, 1, 4, 8), torch.randint(3, (256,))
    data = Dataset("noise", images, labels, images[:9], labels[:9], 3, "")
    monkeypatch.setattr(sparse_ift_claim, "load", lambda path: data)
    monkeypatch.setattr(sparse_ift_claim, "EVERY", 1)
    sparse_ift_claim.main(["run", "--seeds", "0", "--epochs", "1"])
    found = [json.loads(one) for one in capsys.readouterr().out.splitlines()]
    assert [(one["sparsity"], one["method"]) for one in found][:3] == [(0.0, None), (0.5, "static"), (0.5, "set")]
    asked = found[0]["multiply_adds"]
    assert len(found) == 10 and all(abs(one["multiply_adds"] - asked) <= 128 for one in found)
    (tmp_path / "found.jsonl").write_text("\n".join(json.dumps(one) for one in found))
    sparse_ift_claim.main(["draw", str(tmp_path / "found.jsonl"), str(tmp_path / "found.png")])
    assert (tmp_path / "found.png").stat().st_size > 10_000
    sparse_ift_claim.main(["show", str(tmp_path / "found.jsonl")])
    assert len(capsys.readouterr().out.splitlines()) == 12
