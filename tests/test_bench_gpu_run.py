"""bench/gpu_run.sh and its parts: files, budgets, exit codes and signals, as rehearsed without a GPU."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sparsekern.kernels.gpu.config import Problem, package_data
from sparsekern.kernels.gpu.launch import interpreted
from sparsekern.kernels.gpu.roofline import candidates

from bench.gpu import counters, environment, micro, results, sanitize, smoke, table
from bench.gpu.part import FAILED, FINISHED, LOST, MIXED, PARTLY, DeviceLost, Part, main, prepare
from bench.gpu.record_tests import FILE, WITH
from bench.gpu.results import TRIES, Results, circumstances, delete, read_rows, write_json
from bench.gpu.run_tests import NO_GPU, outcomes, targets
from bench.gpu.scene import Case

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the rehearsal is for machines without a GPU")
needs_interpreter = pytest.mark.skipif(not interpreted(), reason="TRITON_INTERPRET is not set")


# The results.


def test_a_file_that_was_cut_off_is_gone_on_with(tmp_path):
    path = tmp_path / "x.jsonl"
    results = Results(path, {"part": "x"})
    results.add({"key": "a", "ms": 1.0})
    results.close()
    path.write_text(path.read_text() + '{"key": "b", "m')
    again = Results(path, {"part": "x"})
    assert again.has("a") and not again.has("b")
    again.add({"key": "b", "ms": 2.0})
    again.close()
    assert [row["key"] for row in read_rows(path)] == ["a", "b"]


def test_what_never_comes_back_is_given_up(tmp_path):
    path = tmp_path / "x.jsonl"
    for attempt in range(TRIES + 1):
        results = Results(path, {})
        assert results.has("hangs") == (attempt == TRIES)
        results.begin("hangs")
        results.close()
    assert any("begun 2 times" in row.get("error", "") for row in read_rows(path))


@needs_interpreter
def test_the_micro_benchmarks_are_right(tmp_path):
    assert main("micro", "", micro.run, ["--out", str(tmp_path), "--rehearse"]) == FINISHED
    rows = {row["key"]: row for row in read_rows(tmp_path / "micro.jsonl") if "part" in row and "key" in row}
    assert set(rows) == {name for name, _ in micro.measurements()} and len(rows) == 19
    assert not [row for row in rows.values() if "error" in row]


def test_the_environment_is_one_line_of_the_table(tmp_path):
    write_json(tmp_path / "environment.json", environment.environment(True))
    assert f"torch {torch.__version__}" in list(table.lines(tmp_path))[1]


def launchable() -> set[str]:
    """Return the kernels of the package that no other one calls."""
    compiled, called = set(), set()
    for path in (ROOT / "kernels/gpu").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list):
                compiled.add(node.name)
                called |= {ast.unparse(inner.func) for inner in ast.walk(node) if isinstance(inner, ast.Call)}
    return compiled - called


@needs_interpreter
def test_the_sanitized_calls_launch_every_kernel(monkeypatch):
    from triton.runtime.interpreter import InterpretedFunction

    launched, run = set(), InterpretedFunction.run

    def record(self, *arguments, **options):
        launched.add(self.fn.__name__)
        return run(self, *arguments, **options)

    monkeypatch.setattr(InterpretedFunction, "run", record)
    assert sanitize.call_kernels(CPU, True, time.monotonic() + 600) == 12 * len(sanitize.REHEARSED)
    assert launched == launchable() and len(launched) >= 7
    assert sanitize.call_kernels(CPU, True, time.monotonic() - 1) == 0


@pytest.mark.parametrize(
    ("program", "code", "output", "failed", "said"),
    [
        ("x", 0, "24 calls\nERROR SUMMARY: 0 errors", False, "sanitizer: 0 errors"),
        ("x", 9, "24 calls\nERROR SUMMARY: 3 errors", True, "sanitizer: FAILED, 3 errors"),
        ("x", 1, "cannot attach", False, "gave no verdict"),
        (None, 0, "24 calls", False, "is not installed"),
        (None, 1, "Traceback", True, "sanitizer: FAILED"),
    ],
)
def test_the_outcome_of_the_sanitizer_is_one_file(tmp_path, program, code, output, failed, said):
    row = sanitize.outcome(program, code, output)
    write_json(tmp_path / "sanitizer.json", row)
    assert row["failed"] is failed and said in "\n".join(table.lines(tmp_path))
    delete(tmp_path, "sanitizer")
    assert not list(tmp_path.iterdir())


@needs_interpreter
def test_force_deletes_what_a_part_has_written_and_nothing_else(tmp_path):
    for name in ("tune.jsonl", "sm_90.json", "race.jsonl"):
        (tmp_path / name).write_text("{}\n")
    assert main("tune", "", lambda part: True, ["--out", str(tmp_path), "--rehearse", "--force"]) == FINISHED
    assert {path.name for path in tmp_path.iterdir()} == {"tune.jsonl", "race.jsonl"}
    assert [row["done"] for row in read_rows(tmp_path / "tune.jsonl")] == [True]


@needs_interpreter
@pytest.mark.parametrize("field", ["device", "commit", "torch", "triton"])
def test_results_of_another_device_or_commit_are_not_gone_on_with(tmp_path, field, capsys):
    row = circumstances("race", True) | {"key": "x", field: "another"}
    (tmp_path / "race.jsonl").write_text(json.dumps(row) + "\n")
    assert main("micro", "", lambda part: True, ["--out", str(tmp_path), "--rehearse"]) == MIXED
    assert f"race.jsonl has results of {field} another" in capsys.readouterr().err


def test_a_copy_without_history_says_the_commit_that_it_was_given(monkeypatch):
    monkeypatch.setenv("COMMIT", "abc1234")
    assert circumstances("race", True)["commit"] == "abc1234"
    monkeypatch.delenv("COMMIT")
    monkeypatch.setattr(results, "ROOT", Path("/"))
    assert circumstances("race", True)["commit"] == "unknown"


@needs_interpreter
def test_the_smoke_test_names_the_family_that_is_wrong(tmp_path, monkeypatch, capsys):
    """In this process; the script's rehearsal starts one for each family."""

    def here(part, family, count):
        rows = [smoke.check(family, case, CPU) for case in smoke.families(True, True)[family]]
        assert len(rows) == count
        return [*rows, {"key": family}]

    monkeypatch.setattr(smoke, "check_in_a_process", here)
    command = ["--out", str(tmp_path / "right"), "--rehearse"]
    monkeypatch.setattr(smoke, "families", lambda *_: {"tma 64": [Case("fwd", "fp16", 70, 64, 64, 64, 0.5)]})
    assert main("smoke", "", smoke.run, command) == FINISHED
    row = read_rows(tmp_path / "right" / "smoke.jsonl")[0]
    assert row["key"] == "tma 64, fwd" and row["config"][0]["tma"] is True
    monkeypatch.setattr(smoke, "named", lambda op, result: {"y": result * float("nan")})
    command[1] = str(tmp_path / "wrong")
    assert main("smoke", "", smoke.run, command) == FAILED
    assert "smoke: tma 64, fwd: y is off by nan" in capsys.readouterr().out
    assert "WRONG: tma 64, fwd" in "\n".join(table.lines(tmp_path / "wrong"))


def test_a_family_whose_process_ends_badly_is_named(tmp_path, monkeypatch):
    part = Part(tmp_path, True, CPU, None, time.monotonic() + 60, SimpleNamespace(rehearse=True, no_tma=False))
    for code, said in (("raise SystemExit('gone')", "exit code 1: gone"), ("print('{}')", "1 of 2 calls are missing")):
        monkeypatch.setattr(smoke, "sys", SimpleNamespace(executable=make_python(tmp_path, code)))
        rows = smoke.check_in_a_process(part, "tma 64", 2)
        assert rows[-1]["key"] == "tma 64" and rows[-1]["error"] == said
    part.ends = time.monotonic() + 0.3
    monkeypatch.setattr(smoke, "sys", SimpleNamespace(executable=make_python(tmp_path, "import time; time.sleep(9)")))
    assert "not done after" in smoke.check_in_a_process(part, "tma 64", 2)[-1]["error"]


def make_python(folder: Path, code: str) -> str:
    """Return a program that runs this code, whatever it is asked to run."""
    program = folder / "python"
    program.write_text(f"#!{sys.executable}\n{code}\n")
    program.chmod(0o755)
    return str(program)


def test_without_the_copy_engine_no_configuration_asks_for_it(tmp_path, monkeypatch):
    for name in ("SPARSEKERN_CACHE", "SPARSEKERN_AUTOTUNE"):
        monkeypatch.setenv(name, str(tmp_path) if name.endswith("CACHE") else "offline")
    problem = Problem("fwd", "sm_90", "bf16", 128, 128, 13, 2)
    assert any(config.tma for config in candidates(problem))
    prepare(tmp_path, True, no_tma=True)
    try:
        assert not any(config.tma for config in candidates(problem))
    finally:
        package_data.cache_clear()


REPORT = """==PROF== Connected
"ID","Metric Name","Metric Unit","Metric Value"
"0","lts__t_sectors_srcunit_tex_op_read.sum","sector","4,000"
"0","lts__t_requests_srcunit_tex_op_read.sum","request","1,250"
"0","Name","","multiply"
"""


def test_counters_are_read_from_a_report(tmp_path):
    found = counters.counted(REPORT)
    assert list(found.values()) == [4000.0, 1250.0] and counters.counted("nothing") == {}
    assert counters.sectors_a_request(found) == 3.2 and counters.sectors_a_request({}) is None
    for row, said in (({"sectors_a_request": 3.2}, "3.20 L2 sectors a request"), ({"error": "none"}, "counters: none")):
        write_json(tmp_path / "counters.json", row)
        assert said in "\n".join(table.lines(tmp_path))


def test_the_tests_for_a_gpu_are_those_that_need_one():
    wanted = targets(rehearsal=False)
    assert "tests/kernels/gpu" in wanted and not {f"tests/{name}" for name in NO_GPU} & set(wanted)
    assert all((ROOT / "tests" / name).is_file() for name in NO_GPU)


def test_tests_that_passed_are_left_out_the_next_time(tmp_path):
    file, tests = tmp_path / "tests.jsonl", tmp_path / "test_two.py"
    tests.write_text("import os\ndef test_a(): pass\ndef test_b(): assert 'FIXED' in os.environ\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "bench.gpu.record_tests",
        "-p",
        "no:cacheprovider",
        str(tests),
    ]
    here = {"device": "a", "commit": "b", "torch": "c", "triton": "d"}
    for fixed, outcome, common, rows in (
        ({}, "failed", here, 2),
        ({"FIXED": "1"}, "passed", here, 3),  # only what had failed
        ({"FIXED": "1"}, "passed", here | {"commit": "another"}, 5),  # what passed elsewhere has not passed here
    ):
        given = os.environ | fixed | {FILE: str(file), WITH: json.dumps(common), "PYTHONPATH": str(ROOT)}
        subprocess.run(command, cwd=tmp_path, env=given, capture_output=True)
        last = outcomes(read_rows(file))
        assert [row["outcome"] for row in last.values()] == ["passed", outcome]
        assert len(read_rows(file)) == rows and read_rows(file)[-1]["commit"] == common["commit"]


@needs_interpreter
def test_a_part_ends_with_its_budget_and_goes_on_the_next_time(tmp_path, monkeypatch):
    command = ["--out", str(tmp_path), "--rehearse"]
    one = ("one", lambda clock, tiny: time.sleep(0.2) or {"ms": 1.0})
    two = ("two", lambda clock, tiny: {"ms": 2.0})
    monkeypatch.setattr(micro, "measurements", lambda: iter([one, two]))
    assert main("micro", "", micro.run, [*command, "--seconds", "0.1"]) == PARTLY
    assert [row["key"] for row in read_rows(tmp_path / "micro.jsonl") if "ms" in row] == ["one"]
    assert main("micro", "", micro.run, command) == FINISHED
    assert [row["key"] for row in read_rows(tmp_path / "micro.jsonl") if "ms" in row] == ["one", "two"]


@needs_interpreter
def test_a_lost_device_is_recorded_and_asks_for_a_new_process(tmp_path, monkeypatch):
    def breaks(clock, tiny):
        raise RuntimeError("an illegal memory access was encountered")

    def dead(device):
        raise DeviceLost("gone")

    monkeypatch.setattr(micro, "measurements", lambda: iter([("bad", breaks), ("good", lambda clock, tiny: {"ms": 1})]))
    monkeypatch.setattr(micro, "check_device", dead)
    command = ["--out", str(tmp_path), "--rehearse"]
    assert main("micro", "", micro.run, command) == LOST
    assert main("micro", "", micro.run, command) == FINISHED
    rows = {row["key"]: row for row in read_rows(tmp_path / "micro.jsonl") if "part" in row and "key" in row}
    assert "illegal" in rows["bad"]["error"] and rows["good"]["ms"] == 1
