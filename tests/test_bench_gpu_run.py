"""bench/gpu_run.sh and its parts: files, budgets, exit codes and signals, as rehearsed without a GPU."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sparsekern.kernels.gpu.launch import interpreted

from bench.gpu import environment, micro, race, sanitize, table
from bench.gpu.part import FINISHED, LOST, MIXED, PARTLY, DeviceLost, main
from bench.gpu.record_tests import FILE, WITH
from bench.gpu.results import TRIES, Results, circumstances, delete, read_rows, write_json
from bench.gpu.run_tests import NO_GPU, outcomes, targets

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
    assert sanitize.call_kernels(CPU, True, time.monotonic() + 60) == 12 * len(sanitize.REHEARSED)
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


def test_earlier_results_are_copied_only_if_they_belong_here(tmp_path, monkeypatch):
    earlier, out = tmp_path / "earlier", tmp_path / "out"
    earlier.mkdir()
    command = ["environment", "--rehearse", "--out", str(out), "--earlier", str(earlier)]
    monkeypatch.setattr(sys, "argv", command)
    row = circumstances("race", True)
    for commit, code, there in (("another", MIXED, False), (row["commit"], FINISHED, True)):
        (earlier / "race.jsonl").write_text(json.dumps(row | {"key": "x", "commit": commit}) + "\n")
        assert environment.main() == code and (out / "race.jsonl").exists() is there


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


# The script: its parts are rehearsed above, each new process costs seconds.

REHEARSED = "race"


def script(out: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    given = os.environ | {"OUT": str(out), "PYTHON": sys.executable, "PYTHONPATH": ""} | environment
    given.pop("TRITON_INTERPRET", None)
    return subprocess.run(["bench/gpu_run.sh", *words], cwd=ROOT, env=given, capture_output=True, text=True)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    out = tmp_path_factory.mktemp("rehearsal")
    return out, script(out, "--rehearse", PARTS=REHEARSED)


# The whole.


def test_a_rehearsal_runs_its_parts_and_says_that_its_times_mean_nothing(rehearsal):
    out, ran = rehearsal
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert {"environment.json", "race.jsonl", "table.txt"} == {path.name for path in out.iterdir()}
    table = (out / "table.txt").read_text()
    assert ran.stdout.endswith(table)
    assert table.splitlines()[0].startswith("*** REHEARSAL") and len(table.splitlines()) <= 40


def test_every_row_says_what_it_was_measured_with(rehearsal):
    for path in rehearsal[0].glob("*.jsonl"):
        for row in read_rows(path):
            if not row.get("begun"):
                assert row["rehearsal"] is True and row["device"] == "cpu (Triton interpreter)"
                assert {"torch", "triton", "commit", "date", "part"} <= row.keys()


def test_the_race_has_a_row_for_each_contestant_of_each_case(rehearsal):
    rows = {row["key"]: row for row in read_rows(rehearsal[0] / "race.jsonl") if "key" in row}
    for case in race.rehearsal_cases():
        for name in ("sparsekern", "cublas", "torch-bsr"):
            row = rows[f"{case.key} | {name}"]
            assert {k: row[k] for k in case._fields} == case._asdict()
            assert ("ms" in row) != ("not_supported" in row)
        ours = rows[f"{case.key} | sparsekern"]
        assert ours["p20"] <= ours["ms"] <= ours["p80"] and ours["best_dense"] == "cublas"
        assert ours["vs_dense"] == pytest.approx(rows[f"{case.key} | cublas"]["ms"] / ours["ms"])


def test_a_second_run_measures_nothing_again_and_other_results_are_not_mixed_in(rehearsal):
    out, _ = rehearsal
    before = (out / "race.jsonl").read_text()
    ran = script(out, "--rehearse", PARTS=REHEARSED)
    assert ran.returncode == 0 and ran.stdout.count(": complete") == 1
    assert (out / "race.jsonl").read_text() == before
    refused = script(out)
    assert refused.returncode == 2 and "holds a rehearsal" in refused.stderr
    (out / "tests.jsonl").write_text('{"key": "x", "commit": "another"}\n')
    refused = script(out, "--rehearse", PARTS=REHEARSED)
    (out / "tests.jsonl").unlink()
    assert refused.returncode == 2 and "tests.jsonl has results of commit another" in refused.stderr


# The script alone, with a Python that is made up.

FAKE = """#!/usr/bin/env bash
case "$2" in
  *environment) echo "$@" > "$OUT/asked"; exit "${ENVIRONMENT:-0}" ;;
  *table) echo "the table" ;;
  *) eval "$PART" ;;
esac
"""


@pytest.fixture
def fake(tmp_path: Path) -> dict[str, str]:
    """The environment of a run in which PART is what a part does, and ENVIRONMENT the exit code of the first one."""
    python = tmp_path / "python"
    python.write_text(FAKE)
    python.chmod(0o755)
    return {"PYTHON": str(python), "PARTS": "micro race"}


def test_a_part_that_fails_stops_no_other_and_is_named_at_the_end(tmp_path, fake):
    ran = script(tmp_path, **fake, PART="[[ $2 != *micro ]]")
    assert ran.returncode == 1 and "== race (" in ran.stdout
    assert ran.stdout.endswith("the table\nFAILED: micro\n")


@pytest.mark.parametrize(
    ("code", "said"),
    [(124, "micro: out of time"), (137, "micro: killed"), (3, "run again to go on: micro"), (1, "FAILED, exit code 1")],
)
def test_how_a_part_ended_is_told(tmp_path, fake, code, said):
    ran = script(tmp_path, **fake | {"PARTS": "micro"}, PART=f"exit {code}")
    assert said in ran.stdout and ran.returncode == (0 if code == 3 else 1)


def test_a_crash_is_tried_again_in_a_new_process(tmp_path, fake):
    ran = script(tmp_path, **fake | {"PARTS": "micro"}, PART='[ -e "$OUT/again" ] || { touch "$OUT/again"; exit 139; }')
    assert ran.returncode == 0 and "exit code 139, again" in ran.stdout


def test_without_a_gpu_nothing_is_begun(tmp_path):
    ran = script(tmp_path, PARTS="micro race")
    assert ran.returncode == 2 and "--rehearse" in ran.stderr
    assert "micro" not in ran.stdout and "race" not in ran.stdout


def test_force_begins_anew_with_the_parts_that_were_asked_for(tmp_path, fake):
    assert script(tmp_path, "--force", **fake, PART="true").returncode == 0
    asked = (tmp_path / "asked").read_text()
    assert "--parts micro race" in asked and "--force" in asked


@pytest.mark.parametrize(
    ("words", "environment", "said"),
    [
        (["--nonsense"], {}, "there is no option '--nonsense'"),
        ([], {"PARTS": "micro nothing"}, "there is no part 'nothing'"),
        ([], {"BUDGET_PERCENT": "ten"}, "BUDGET_PERCENT is 'ten'"),
        ([], {"TOTAL_SECONDS": "0"}, "TOTAL_SECONDS is '0'"),
        ([], {"FROM": "/nowhere"}, "FROM is '/nowhere', which is no folder"),
        (["--force"], {"FROM": "/"}, "give one of them"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_runs(tmp_path, fake, words, environment, said):
    ran = script(tmp_path / "out", *words, **fake | environment)
    assert ran.returncode == 2 and ran.stdout == "" and said in ran.stderr


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_the_script_explains_itself(tmp_path, word):
    ran = script(tmp_path, word)
    assert ran.returncode == 0 and "BUDGET_PERCENT" in ran.stdout and "130 if it was interrupted" in ran.stdout
    assert "set -euo" not in ran.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_everything_and_tells_how_to_go_on(tmp_path, fake, number):
    part = 'sleep 60 & echo $! > "$OUT/new"; mv "$OUT/new" "$OUT/pid"; wait'
    given = os.environ | {"OUT": str(tmp_path), "PART": part} | fake
    given.pop("TRITON_INTERPRET", None)
    ran = subprocess.Popen(
        ["bench/gpu_run.sh"],
        cwd=ROOT,
        env=given,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a group, as that of a terminal, which gets Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_until(lambda: (tmp_path / "pid").exists())
    os.killpg(ran.pid, number)
    _, said = ran.communicate(timeout=20)
    assert ran.returncode == 130 and "run again" in said
    worker = int((tmp_path / "pid").read_text())
    wait_until(lambda: not alive(worker))


def wait_until(holds: Callable[[], bool]) -> None:
    ends = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.05)


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
