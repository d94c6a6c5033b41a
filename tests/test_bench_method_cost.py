"""The cost of updates, rehearsed on a tiny layer: its lines, not its times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import method_cost

RESULTS = Path(__file__).parent.parent / "bench/results/method_cost.jsonl"


TINY = ["--tokens", "8", "--inputs", "64", "--outputs", "64", "--rounds", "1"]


def test_a_rehearsal_has_a_line_for_each_method(capsys):
    method_cost.main([*TINY, "--blocks", "16", "1"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["block"], row["method"]) for row in rows] == [(b, m) for b in (16, 1) for m in method_cost.METHODS]
    assert all(row["step_ms"] > 0 and row["percent"] == row["percent"] for row in rows)
    assert rows[1]["bound"] == 3.0 and "bound" not in rows[0]
    committed = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    assert [row["threads"] for row in committed] == [2] * len(rows) + [1] * len(rows)
    assert [set(row) for row in committed] == 2 * [set(row) for row in rows]


def test_a_cycle_ends_in_an_update():
    options = method_cost.parse(TINY)
    for name in method_cost.METHODS:
        run, steps, method = method_cost.cycle(name, 16, options)
        run()
        assert method.updates == 1 and method.steps == steps, name


def test_a_wrong_fraction_is_said():
    with pytest.raises(ValueError, match="drop_fraction is 2.0"):
        method_cost.main([*TINY, "--blocks", "16", "--methods", "SET", "--drop", "2"])
