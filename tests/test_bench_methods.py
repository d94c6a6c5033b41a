"""The measurements of methods, rehearsed on tiny layers: their rows, tables and pictures, not what they show."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import sparsekern as sk
from bench import (
    agent_claim,
    attention,
    end_to_end,
    gradual,
    language,
    masked,
    method_cost,
    sparse_ift_claim,
    sparse_ift_table,
    width,
)
from bench.agent_claim_table import reached, tables
from bench.gpu.results import read_rows
from bench.sparse_ift_table import Network, described, kept_bytes, rows
from sparsekern.lab.data import Dataset

RESULTS = Path(__file__).parent.parent / "bench/results"


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def committed(name: str) -> list[dict]:
    return lines((RESULTS / f"{name}.jsonl").read_text())


# AGENT's claim.


@pytest.fixture
def data(tmp_path):
    draw = np.random.default_rng(0)
    sets = {}
    for part, count in (("train", 40), ("test", 10)):
        sets[f"{part}_labels"] = labels = (np.arange(count) % 10).astype(np.uint8)
        sets[f"{part}_images"] = draw.integers(0, 25 * (labels[:, None, None] + 1), (count, 6, 6)).astype(np.uint8)
    np.savez(tmp_path / "tiny.npz", **sets)
    return str(tmp_path / "tiny.npz")


def test_agent_has_a_row_a_training_and_repeats_none(data, tmp_path, capsys):
    out, picture = tmp_path / "rows.jsonl", tmp_path / "curves.png"
    arguments = [data, "--out", str(out), "--width", "16", "--batch", "10", "--epochs", "2", "--sparsity", "0.5"]
    agent_claim.main([*arguments, "--seeds", "0", "--plot", str(picture)])
    made = agent_claim.read(out)
    assert [row["contestant"] for row in made] == list(agent_claim.CONTESTANTS)
    ends = {row["contestant"]: row["points"][-1] for row in made}
    assert {name: end["epoch"] for name, end in ends.items()} == {name: 2 for name in ends} | {"epochs x3.3": 6.5}
    sgd = ends["sgd"]["flops"]
    assert ends["batch x2"]["flops"] == sgd == ends["rate / 10"]["flops"]
    assert ends["agent"]["flops"] > 2.5 * sgd and ends["epochs x3.3"]["flops"] == sgd / 8 * 26
    assert ends["agent"]["c"] >= 0 and "c" not in ends["sgd"]
    assert all(b["seconds"] > a["seconds"] for row in made for a, b in pairwise(row["points"]))
    assert picture.stat().st_size > 10_000
    agent_claim.main([*arguments, "--seeds", "0"])
    assert agent_claim.read(out) == made
    agent_claim.main([*arguments, "--seeds", "1", "--contestants", "sgd", "--untimed", "--plot", str(picture)])
    assert not any("seconds" in point for point in agent_claim.read(out)[-1]["points"])
    assert capsys.readouterr().out.count("50 % sparse: FLOPs to reach") == 3
    assert {frozenset(row) for row in committed("agent_claim")} == {frozenset(row) for row in made}
    assert {"sgd", "agent"} <= {row["contestant"] for row in committed("agent_claim")} <= set(agent_claim.CONTESTANTS)


def point(epoch, accuracy):
    return {"epoch": epoch, "accuracy": accuracy, "flops": 2e9 * epoch, "seconds": 3 * epoch}


def test_agents_table_by_hand():
    curves = {
        "sgd": [[point(1, 0.81), point(2, 0.83), point(3, 0.821)], [point(1, 0.7), point(2, 0.8), point(3, 0.81)]],
        "agent": [[point(1, 0.83), point(2, 0.845)], [point(1, 0.82), point(2, 0.85)]],
    }
    given = [
        {"contestant": name, "sparsity": 0.9, "seed": seed, "points": points}
        for name, seeds in curves.items()
        for seed, points in enumerate(seeds)
    ]
    text = tables(given).splitlines()
    assert text[:6] == [
        "90 % sparse: epochs to reach an accuracy, mean over seeds",
        "",
        "|  | 80 % | 82 % | 84 % |",
        "| --- | ---: | ---: | ---: |",
        "| sgd | 1.5 | - | - |",
        "| agent | 1 | 1 | 2 |",
    ]
    assert "| sgd | 3 G | - | - |" in text and "| agent | 3 | 3 | 6 |" in text
    assert "| sgd | 2 | 81.55 ± 0.78 % | 82.00 % | 6 G | 9 |  |  |" in text
    assert reached(curves["sgd"][1], 0.82) is None
    for row in given[1:3]:  # the second seed of sgd and the first of agent were not timed
        row["points"] = [{key: value for key, value in p.items() if key != "seconds"} for p in row["points"]]
    text = tables(given).splitlines()
    assert "| sgd | 3 | - | - |" in text and "| agent | 3 | 3 | 6 |" in text
    assert "| sgd | 2 | 81.55 ± 0.78 % | 82.00 % | 6 G | 9 |  |  |" in text
    given[3]["points"] = given[2]["points"]
    text = tables(given).splitlines()
    assert "| agent | - |" in text and any(line.endswith("| 4 G | - |  |  |") for line in text)


# Whole steps: of every method with its updates, and of whole networks.


TINY = ["--tokens", "8", "--inputs", "64", "--outputs", "64", "--rounds", "1"]


def test_the_cost_of_updates_has_a_row_for_each_method(capsys):
    method_cost.main([*TINY, "--blocks", "16", "1"])
    made = lines(capsys.readouterr().out)
    assert [(row["block"], row["method"]) for row in made] == [(b, m) for b in (16, 1) for m in method_cost.METHODS]
    assert all(row["step_ms"] > 0 and row["percent"] == row["percent"] for row in made)
    assert made[1]["bound"] == 3.0 and "bound" not in made[0]
    assert [row["threads"] for row in committed("method_cost")] == [2] * len(made) + [1] * len(made)
    assert [set(row) for row in committed("method_cost")] == 2 * [set(row) for row in made]
    with pytest.raises(ValueError, match="drop_fraction is 2.0"):
        method_cost.main([*TINY, "--blocks", "16", "--methods", "SET", "--drop", "2"])


def test_attention_is_compared_at_each_number_of_threads(capsys, tmp_path):
    attention.main(["--out", str(tmp_path / "rows.jsonl"), "--threads", "1", "--most-tokens", "64", "--rounds", "1"])
    (made,) = lines(capsys.readouterr().out)
    assert all(made[f"{name}_{part}_ms"] > 0 for name in ("pytorch", "ours") for part in ("forward", "backward"))
    rows = committed("attention")
    assert [row["threads"] for row in rows] == [1] * len(attention.CASES) + [2] * len(attention.CASES)
    assert all(set(row) == set(made) for row in rows)
    qkv = torch.randn(2, 5, 3 * 128)
    torch.testing.assert_close(attention.pytorch(qkv, 2), sk.nn.qkv_attention(qkv, 2, is_causal=True))


def test_a_measured_cycle_ends_in_an_update():
    options = method_cost.parse(TINY)
    for name in method_cost.METHODS:
        run, steps, method = method_cost.cycle(name, 16, options)
        run()
        assert method.updates == 1 and method.steps == steps, name


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("sparsekern::conv2d", "our kernels"),
        ("aten::mkldnn_convolution", "dense products"),
        ("aten::native_batch_norm_backward", "batch norm"),
        ("aten::threshold_backward", "relu"),
        ("aten::_foreach_add_", "optimizer"),
        ("autograd::engine::evaluate_function: AddBackward0", "other"),
    ],
)
def test_the_part_of_a_step_that_an_operator_counts_to(name, part):
    assert end_to_end.part_of(name) == part


def test_steps_of_networks_are_measured_and_their_parts_too(monkeypatch, tmp_path, capsys, threads):
    monkeypatch.setattr(end_to_end, "IMAGES", 2)
    monkeypatch.setattr(end_to_end, "NETWORKS", ("resnet20",))
    threads(1)
    out = tmp_path / "rows.jsonl"
    assert end_to_end.main(["--quick", "--out", str(out)]) == 0 and torch.get_num_threads() == 1
    dense, sparse = read_rows(out)
    assert (dense["sparsity"], sparse["sparsity"], dense["vs_dense"]) == (None, 0.9, 1.0)
    assert "our kernels" not in dense["shares"] and sparse["shares"]["our kernels"] > 0
    assert sum(sparse["shares"].values()) == pytest.approx(1, abs=0.01) and sparse["samples"] == 4
    assert sparse["vs_dense"] == pytest.approx(dense["ms"] / sparse["ms"], rel=1e-2)
    said = capsys.readouterr().out
    assert "resnet20 b16" in said and "our kernels" in said and "90%" in said


# Sparse-IFT.


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


def test_a_forward_keeps_the_input_of_the_first_layer_and_the_output_of_the_relu():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    x = torch.randn(5, 8)
    assert kept_bytes(model, x) == 4 * 5 * (8 + 16)  # weights are not counted
    assert described(model, Network(lambda width: model, x, x, 4, ()))["parameters"] == 9 * 16 + 17 * 3


def test_the_table_of_the_claim_by_hand():
    common = {"parameters": 1000, "multiply_adds": 900, "cpu_ms_per_step": 1.5, "graphs": []}
    given = [
        {"sparsity": sparsity, "method": method, "seed": seed, "accuracy": [50.0, last], **common}
        for sparsity, method, seed, last in (
            *((0.0, None, 0, 80.0), (0.0, None, 1, 82.0)),
            *((0.5, "set", 0, 81.0), (0.5, "set", 1, 85.0)),
        )
    ]
    text = sparse_ift_claim.table(given).splitlines()
    assert text[2].startswith("| dense |  | 81.00 % | 80.00 to 82.00 |  | 1,000 | 900 |")
    assert "| 83.00 % | 81.00 to 85.00 | +2.00 ± 1.00 |" in text[3]  # differences 1 and 3


def test_the_claim_runs_and_is_drawn(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    images, labels = torch.rand(256, 1, 4, 8), torch.randint(3, (256,))
    data = Dataset("noise", images, labels, images[:9], labels[:9], 3, "")
    monkeypatch.setattr(sparse_ift_claim, "load", lambda path: data)
    monkeypatch.setattr(sparse_ift_claim, "EVERY", 1)
    sparse_ift_claim.main(["run", "--seeds", "0", "--epochs", "1"])
    found = lines(capsys.readouterr().out)
    assert [(one["sparsity"], one["method"]) for one in found][:3] == [(0.0, None), (0.5, "static"), (0.5, "set")]
    asked = found[0]["multiply_adds"]
    assert len(found) == 10 and all(abs(one["multiply_adds"] - asked) <= 128 for one in found)
    (tmp_path / "found.jsonl").write_text("\n".join(json.dumps(one) for one in found))
    sparse_ift_claim.main(["draw", str(tmp_path / "found.jsonl"), str(tmp_path / "found.png")])
    assert (tmp_path / "found.png").stat().st_size > 10_000
    sparse_ift_claim.main(["show", str(tmp_path / "found.jsonl")])
    assert len(capsys.readouterr().out.splitlines()) == 12


# GSE's width, and the masked twin.


def test_the_widths_have_rows_exponents_and_a_picture(tmp_path, capsys):
    out = tmp_path / "width.jsonl"
    width.main(["--widths", "128", "256", "--blocks", "16", "--tokens", "4", "2", "--rounds", "1", "--out", str(out)])
    made = lines(out.read_text())
    assert {row["what"] for row in made} == {"step", "gse update", "rigl update", "dense step"}
    assert all(row["ms"] > 0 for row in made if row.get("what") in ("step", "dense step") and "ms" in row)
    assert len([row for row in made if "exponent" in row]) == 4 + 2
    before = out.with_suffix(".png").stat().st_mtime_ns
    width.main(["--draw", "--out", str(out)])
    assert lines(out.read_text()) == made and out.with_suffix(".png").stat().st_mtime_ns > before
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG") and "width^" in capsys.readouterr().out


def test_the_exponent_of_a_power():
    given = [{"block": 1, "tokens": 4, "what": "step", "width": w, "ms": 3e-3 * w**1.5} for w in (512, 1024, 4096)]
    given.append({"block": 1, "tokens": 4, "what": "gse update", "width": 512, "ms": 1.0})
    slopes = {row["what"]: row["exponent"] for row in width.exponents(given)}
    assert slopes == {"step": pytest.approx(1.5, abs=1e-3), "gse update": None}


def test_elements_are_a_constant_multiple_of_the_features(monkeypatch):
    layers = []
    monkeypatch.setattr(width, "training", lambda layer, *_: layers.append(layer))
    for features in (512, 1024):
        for block in (1, 16):
            width.contestants(features, block, 4)["step"]()
            assert layers[-1].topology.elements() == width.PER_FEATURE * 2 * features


def test_a_width_that_would_take_long_is_left_out(monkeypatch):
    monkeypatch.setattr(width, "LONG", 1e-9)
    measured = width.measure((128, 256), (16,), 4, 1, peers=True)
    assert [(row["width"], row["what"]) for row in measured] == [
        *((128, what) for what in ("step", "gse update", "rigl update", "dense step")),
        *((256, what) for what in ("step", "gse update")),
    ]


def test_the_masked_twin_has_a_row_for_each_block(tmp_path, capsys, monkeypatch):
    flushed: list[bool] = []  # the switch is of the whole process: other tests here need subnormal numbers
    monkeypatch.setattr(torch, "set_flush_denormal", flushed.append)
    out = tmp_path / "masked.jsonl"
    arguments = ["--widths=64", "--blocks", "1", "16", "--sparsities=0.75", "--tokens=4", "--side=4", "--rounds=1"]
    masked.main([*arguments, "--out", str(out)])
    assert flushed == [True]
    made = lines(out.read_text())
    assert [row["block"] for row in made] == [1, 16] and all(row["vs_masked"] > 0 for row in made)
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_the_masked_twin_computes_the_same():
    models = masked.networks(64, 4, 16, 0.75)
    x = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(models["masked"](x), models["sparse"](x))
    for model in (models["masked"], models["sparse"]):
        model(x).square().sum().backward()
    layer, twin = models["sparse"].hidden1, models["masked"].hidden1
    dense = sk.topology.to_dense(layer.topology, layer.values.grad)
    torch.testing.assert_close(twin.weight.grad, dense)


@pytest.mark.parametrize("name", ["width", "masked"])
def test_the_committed_runs(name):
    found = committed(name)
    assert found and all(row["device"] for row in found if "exponent" not in row)
    if name == "width":
        slopes = [row["exponent"] for row in found if "exponent" in row and row["what"] in ("step", "gse update")]
        assert len(slopes) == 8


# Gradual pruning.


def test_gradual_has_a_row_an_update(capsys):
    gradual.main(["--width", "64", "--tokens", "8", "--block", "16", "--updates", "2", "--rounds", "1"])
    rows = lines(capsys.readouterr().out)
    assert [row["sparsity"] for row in rows] == [0.0, 0.8125, 0.9375]
    kept, compact, dense = ([row[f"{name}_mib"] for row in rows] for name in ("kept", "compact", "dense"))
    assert kept[0] == kept[-1] == compact[0] > 2 * compact[-1] and dense[0] == dense[-1]
    assert all(row["kept_ms"] > 0 and row["compact_update_ms"] > 0 for row in rows)


def test_the_table_of_language_models_by_hand(tmp_path, capsys):
    """Two runs: of one the last of two epochs counts, with the seconds of both; a dense twin is a line of its own."""
    for name, networks, epochs in (("long", ("sparse", "dense"), 2), ("short", ("dense",), 1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"config": {"method": "set", "epochs": epochs}}))
        rows = [
            {"seed": 0, "network": network, "epoch": epoch, "step": 10 * epoch, "itop/layer": 1.0}
            | {"bits_per_byte": 3 - epoch / 4, "ms_per_step": 5.0 * epoch, "seconds": 90.0}
            for network in networks
            for epoch in range(1, epochs + 1)
        ]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "rows.jsonl"
    language.main([str(tmp_path / "long"), str(tmp_path / "short"), "--out", str(out)])
    shown = capsys.readouterr().out
    assert shown.splitlines()[2:5] == [
        "| set | 20 | 1 | 2.50 | 10 | 3 |",
        "| dense | 20 | 1 | 2.50 | 10 | 3 |",
        "| dense | 10 | 1 | 2.75 | 5 | 2 |",
    ]
    language.main(["--show", str(out)])
    assert capsys.readouterr().out == shown
    with pytest.raises(SystemExit):
        language.main([])
