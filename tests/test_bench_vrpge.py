"""The race of whole steps of VR-PGE, rehearsed on a tiny network: its lines, not its times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import vrpge_step

RESULTS = Path(__file__).parent.parent / "bench/results/vrpge_step.jsonl"


def test_a_rehearsal_has_a_line_for_each_ratio(capsys):
    vrpge_step.main(["--width", "64", "--tokens", "8", "--block", "16", "--rounds", "1"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["network"] for row in rows[:2]] == ["dense MKL", "dense oneDNN"]
    assert {row["ratio"] for row in rows[2:]} == {0.1, 0.25, 0.5}
    assert all(row["ms"] > 0 and row["speedup"] > 0 for row in rows[2:])
    committed = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    assert [set(row) for row in committed] == [set(row) for row in rows] * 2


def test_the_dense_peer_has_the_gradients_of_a_linear_layer():
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("PyTorch has no oneDNN here")
    plain = torch.nn.Linear(12, 5)
    peer = vrpge_step.OneDnnLinear(12, 5)
    peer.load_state_dict(plain.state_dict())
    results = []
    for layer in (plain, peer):
        x = torch.randn(7, 12, generator=torch.Generator().manual_seed(0), requires_grad=True)
        layer(x).square().sum().backward()
        results.append([x.grad, layer.weight.grad, layer.bias.grad])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
