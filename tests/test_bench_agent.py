"""The trainings of AGENT's claim, rehearsed on a tiny set: their rows, tables and picture, not what they show."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from bench import agent_claim
from bench.agent_claim_table import reached, tables

RESULTS = Path(__file__).parent.parent / "bench/results/agent_claim.jsonl"


@pytest.fixture
def data(tmp_path):
    draw = np.random.default_rng(0)
    sets = {}
    for part, count in (("train", 40), ("test", 10)):
        sets[f"{part}_labels"] = labels = (np.arange(count) % 10).astype(np.uint8)
        sets[f"{part}_images"] = draw.integers(0, 25 * (labels[:, None, None] + 1), (count, 6, 6)).astype(np.uint8)
    np.savez(tmp_path / "tiny.npz", **sets)
    return str(tmp_path / "tiny.npz")


def test_a_rehearsal_has_a_row_a_training_and_repeats_none(data, tmp_path, capsys):
    out, picture = tmp_path / "rows.jsonl", tmp_path / "curves.png"
    arguments = [data, "--out", str(out), "--width", "16", "--batch", "10", "--epochs", "2", "--sparsity", "0.5"]
    agent_claim.main([*arguments, "--seeds", "0", "--plot", str(picture)])
    rows = agent_claim.read(out)
    assert [row["contestant"] for row in rows] == list(agent_claim.CONTESTANTS)
    ends = {row["contestant"]: row["points"][-1] for row in rows}
    assert {name: end["epoch"] for name, end in ends.items()} == {name: 2 for name in ends} | {"epochs x3.3": 6.5}
    sgd = ends["sgd"]["flops"]
    assert ends["batch x2"]["flops"] == sgd == ends["rate / 10"]["flops"]
    assert ends["agent"]["flops"] > 2.5 * sgd and ends["epochs x3.3"]["flops"] == sgd / 8 * 26
    assert ends["agent"]["c"] >= 0 and "c" not in ends["sgd"]
    assert all(b["seconds"] > a["seconds"] for row in rows for a, b in pairwise(row["points"]))
    assert picture.stat().st_size > 10_000
    agent_claim.main([*arguments, "--seeds", "0"])
    assert agent_claim.read(out) == rows
    agent_claim.main([*arguments, "--seeds", "1", "--contestants", "sgd", "--untimed", "--plot", str(picture)])
    assert not any("seconds" in point for point in agent_claim.read(out)[-1]["points"])
    text = capsys.readouterr().out
    assert text.count("50 % sparse: FLOPs to reach") == 3
    if RESULTS.is_file():
        committed = [json.loads(line) for line in RESULTS.read_text().splitlines()]
        assert {frozenset(row) for row in committed} == {frozenset(row) for row in rows}
        assert {"sgd", "agent"} <= {row["contestant"] for row in committed} <= set(agent_claim.CONTESTANTS)


def point(epoch, accuracy):
    return {"epoch": epoch, "accuracy": accuracy, "flops": 2e9 * epoch, "seconds": 3 * epoch}


def test_a_table_by_hand():
    curves = {
        "sgd": [[point(1, 0.81), point(2, 0.83), point(3, 0.821)], [point(1, 0.7), point(2, 0.8), point(3, 0.81)]],
        "agent": [[point(1, 0.83), point(2, 0.845)], [point(1, 0.82), point(2, 0.85)]],
    }
    rows = [
        {"contestant": name, "sparsity": 0.9, "seed": seed, "points": points}
        for name, seeds in curves.items()
        for seed, points in enumerate(seeds)
    ]
    lines = tables(rows).splitlines()
    assert lines[:6] == [
        "90 % sparse: epochs to reach an accuracy, mean over seeds",
        "",
        "|  | 80 % | 82 % | 84 % |",
        "| --- | ---: | ---: | ---: |",
        "| sgd | 1.5 | - | - |",
        "| agent | 1 | 1 | 2 |",
    ]
    assert "| sgd | 3 G | - | - |" in lines and "| agent | 3 | 3 | 6 |" in lines
    assert "| sgd | 2 | 81.55 ± 0.78 % | 82.00 % | 6 G | 9 |  |  |" in lines
    assert reached(curves["sgd"][1], 0.82) is None
    for row in rows[1:3]:  # the second seed of sgd and the first of agent were not timed
        row["points"] = [{key: value for key, value in p.items() if key != "seconds"} for p in row["points"]]
    lines = tables(rows).splitlines()
    assert "| sgd | 3 | - | - |" in lines and "| agent | 3 | 3 | 6 |" in lines
    assert "| sgd | 2 | 81.55 ± 0.78 % | 82.00 % | 6 G | 9 |  |  |" in lines
    rows[3]["points"] = rows[2]["points"]
    lines = tables(rows).splitlines()
    assert "| agent | - |" in lines and any(line.endswith("| 4 G | - |  |  |") for line in lines)
