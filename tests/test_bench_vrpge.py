"""The measurements of VR-PGE, rehearsed on small networks: their rows and peers, not what they show."""

from __future__ import annotations

import json

import pytest
import torch

from bench import vrpge_claim, vrpge_step
from bench.cpu.results import circumstances
from tests.test_bench_methods import committed, lines


@pytest.fixture(autouse=True)
def tiny_numbers_stay(monkeypatch):
    """The measurements flush them in this process; hypothesis and comparisons of scores need them."""
    monkeypatch.setattr(torch, "set_flush_denormal", lambda on: None)


def test_vrpge_has_a_row_for_each_network(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    small = ["--rounds", "1", "--threads", "1", "--batch", "2", "--networks", "mlp", "resnet20", "--out", str(out)]
    vrpge_step.main(small)
    made = lines(out.read_text())
    assert lines(capsys.readouterr().out) == [{k: row[k] for k in row if k not in circumstances()} for row in made]
    for row in made:
        dense = min(row["dense_ms"], row.get("dense_onednn_ms", row["dense_ms"]))
        assert row["vs_dense"] == pytest.approx(dense / row["vrpge_ms"], rel=2e-3)
        assert row["vs_masked_pge_every4"] == pytest.approx(row["masked_pge_ms"] / row["vrpge_every4_ms"], rel=2e-3)
        assert row["vrpge_p25"] <= row["vrpge_ms"] <= row["vrpge_p75"]
    kept = committed("vrpge_step")
    assert {row["network"] for row in kept} <= set(vrpge_step.NETWORKS)
    assert {frozenset(row) for row in kept} <= {frozenset(row) for row in made}


def test_vrpges_masked_peer_multiplies_whole_blocks_and_learns_where():
    mask = vrpge_step.BlockMask(torch.zeros(5, 3, 2, 2), 2, 0.5, learns=True)
    torch.manual_seed(0)
    weight = torch.ones(5, 3, 2, 2, requires_grad=True)
    masked_weight = mask(weight)
    kept = masked_weight.detach()
    assert kept.unique().tolist() == [0, 1]
    for first, second in ((kept[0], kept[1]), (kept[2], kept[3]), (kept[:, 0], kept[:, 1])):
        assert torch.equal(first, second)
    masked_weight.sum().backward()
    assert torch.equal(weight.grad, kept)
    assert mask.probability.grad[:, :, 0, 0].tolist() == [[4, 2], [4, 2], [2, 1]]


def test_vrpges_claim_says_when_an_accuracy_was_reached(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    vrpge_claim.main(["--seeds", "1", "--epochs", "2", "--width", "64", "--accuracy", "0.05", "--out", str(out)])
    (row,) = lines(out.read_text())
    text = capsys.readouterr().out.splitlines()
    assert json.loads(text[0]) == {k: row[k] for k in row if k not in circumstances()}
    assert text[1] == f"vrpge: {row['vrpge_s']:.3g} s to 5.0%"
    assert 0 < row["vrpge_s"] <= row["vrpge_all_s"] and row["vrpge_steps"] in (23, 46)
    assert row["masked_pge_s"] == pytest.approx(row["vrpge_steps"] * row["masked_pge_ms"] / 1e3, rel=2e-3)
    assert {frozenset(r) for r in committed("vrpge_claim")} == {frozenset(row)}
    training = object.__new__(vrpge_claim.Training)
    training.points = [(23, 0.5, 0.7), (46, 1.0, 0.9), (69, 1.5, 0.8)]
    assert training.reached(0.8) == (46, 1.0) and training.reached(0.95) is None


def test_vrpges_dense_peer_has_the_gradients_of_a_linear_layer():
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
