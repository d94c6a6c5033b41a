"""What is measured and written of plans: which runs, when they count as good enough, and the page."""

from __future__ import annotations

import pytest

from bench import plan_check, plan_table
from bench.gpu.results import read_rows
from sparsekern.analysis.plan import Machine


def row(time_error=0.0, memory_error=0.0):
    return {
        "recipe": "gpt",
        "batch": 4,
        "sparsity": {"mlp": 0.9, "attention": 0.7},
        "block": 32,
        "threads": 1,
        "predicted_ms": 100 * (1 + time_error),
        "ms": 100.0,
        "time_error": time_error,
        "predicted_bytes": 2**20,
        "bytes": 2**20,
        "memory_error": memory_error,
    }


def test_there_are_twenty_runs_of_all_kinds():
    assert len(set(map(str, plan_check.CASES))) == 20
    assert {case.threads for case in plan_check.CASES} == {1, 2}
    assert {case.block for case in plan_check.CASES} >= {1, 16, 32, 64}
    assert len({case.recipe for case in plan_check.CASES}) >= 6
    assert sum(case.sparsity is None for case in plan_check.CASES) >= 4


def test_errors_that_are_too_large_are_named():
    assert plan_check.misses([row(0.14), row(-0.15), row(0.29, -0.05)]) == []
    assert plan_check.misses([row(0.16)]) == ["the median error of time is above 15%"]
    assert plan_check.misses([row(), row(), row(-0.31)]) == ["an error of time is above 30%"]
    assert plan_check.misses([row(memory_error=-0.06)]) == ["an error of memory is above 5%"]


def test_the_summary_and_the_table():
    rows = [row(0.1), row(-0.2, 0.01), row()]
    assert plan_check.summary_of(rows) == (
        "3 runs. Time: median error 10.0%, worst 20.0%. Memory: median 0.00%, worst 1.00%. all as they must be."
    )
    assert plan_check.table_of(rows).row_count == 3


def test_a_file_is_shown(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    plan_check.write_rows(file, [row(0.1), row(0.4)])
    assert read_rows(file) == [row(0.1), row(0.4)]
    assert plan_check.main(["--show", str(file)]) == 1
    assert "an error of time is above 30%" in " ".join(capsys.readouterr().out.split())


def test_the_time_of_all_threads_is_no_time_of_a_step(capsys):
    with pytest.raises(SystemExit):
        plan_check.main(["--cpu-time"])
    assert "--cpu-time counts the time of all threads" in capsys.readouterr().err


def test_a_run_is_predicted_and_measured():
    curves = {name: [(1.0, 1e-9)] for name in ("add", "mm", "_fused_adamw_", "sparse linear 16x16 forward@64")}
    machine = Machine({}, 1e-6, 1e-6, curves | {"sparse linear 16x16 backward@64": [(1.0, 1e-9)]})
    found = plan_check.row_of(plan_check.Case("mlp", 64, 0.99, 16, 1), machine)
    assert found["ms"] > 0 and found["predicted_ms"] > 0
    assert abs(found["memory_error"]) <= plan_check.MEMORY


def test_the_tables_are_replaced_and_the_rest_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(plan_table, "MODELS", {"tiny": (256, 2)})
    monkeypatch.setattr(plan_table, "TOKENS", 16)
    monkeypatch.setattr(plan_table, "BLOCK", 16)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{plan_table.BEGIN}\nold\n{plan_table.END}\nafter\n")
    assert plan_table.main(["--page", str(page), "--models", "tiny"]) == 0
    lines = page.read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and "old" not in lines
    rows = [line for line in lines if line.startswith("| tiny")]
    assert [row.split(" | ")[1:3] for row in rows] == [
        ["1", "single"],
        *([str(devices), strategy] for devices in (8, 64, 512) for strategy in ("ddp", "fsdp2")),
    ]
    assert all(" | both | " in row for row in rows)
