"""The rehearsal of bench/gpu_run.sh: what can be known of it without a GPU."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from sparsekern.kernels.gpu.launch import interpreted

from bench.gpu import calls, contestants, environment, micro, race, sanitize, table, tune
from bench.gpu.clock import Clock
from bench.gpu.goals import GOALS, break_even, verdict
from bench.gpu.part import FINISHED, LOST, PARTLY, DeviceLost, Part, main
from bench.gpu.record_tests import FILE
from bench.gpu.results import TRIES, Results, circumstances, read_rows, write_json
from bench.gpu.run_tests import outcomes
from bench.gpu.scene import OPS, Case, Judge, make_scene

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
REHEARSED = "race"  # the others are rehearsed in this process: each new one costs seconds
CASE = Case("step", "fp16", 16, 32, 32, 16, 0.5)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the rehearsal is for machines without a GPU")
needs_interpreter = pytest.mark.skipif(not interpreted(), reason="TRITON_INTERPRET is not set")


def script(out: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    given = os.environ | {"OUT": str(out), "PYTHON": sys.executable, "PYTHONPATH": ""} | environment
    given.pop("TRITON_INTERPRET", None)
    return subprocess.run(["bench/gpu_run.sh", *words], cwd=ROOT, env=given, capture_output=True, text=True)


@pytest.fixture
def part(tmp_path: Path):
    results = Results(tmp_path / "race.jsonl", circumstances("race", True))
    yield Part(tmp_path, True, CPU, results, time.monotonic() + 60)
    results.close()


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    out = tmp_path_factory.mktemp("rehearsal")
    return out, script(out, "--rehearse", PARTS=REHEARSED)


# The whole.


def test_a_rehearsal_runs_its_parts_and_says_that_its_times_mean_nothing(rehearsal):
    out, ran = rehearsal
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert {"race.jsonl", "table.txt"} == {path.name for path in out.iterdir()}
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
            assert ("ms" in row) != ("error" in row or "refused" in row)
        ours = rows[f"{case.key} | sparsekern"]
        assert ours["p20"] <= ours["ms"] <= ours["p80"] and ours["best_dense"] == "cublas"
        assert ours["vs_dense"] == pytest.approx(rows[f"{case.key} | cublas"]["ms"] / ours["ms"])


def test_a_second_run_measures_nothing_again_and_other_results_are_not_mixed_in(rehearsal):
    out, _ = rehearsal
    before = {path.name: path.read_text() for path in out.iterdir()}
    ran = script(out, "--rehearse", PARTS=REHEARSED)
    assert ran.returncode == 0 and ran.stdout.count(": complete") == 1
    assert {path.name: path.read_text() for path in out.iterdir()} == before
    refused = script(out)
    assert refused.returncode == 2 and "mixes a rehearsal" in refused.stderr


def test_a_part_that_fails_does_not_stop_the_table_and_is_named_at_the_end(tmp_path):
    ran = script(tmp_path, PARTS="micro")  # there is no GPU
    assert ran.returncode == 1 and ran.stdout.rstrip().endswith("FAILED: micro")
    assert "environment: not recorded" in (tmp_path / "table.txt").read_text()


def test_the_script_explains_itself_and_refuses_what_it_does_not_know(tmp_path):
    assert script(tmp_path, "--help").returncode == 0 and "BUDGET_PERCENT" in script(tmp_path, "--help").stdout
    assert script(tmp_path, "--nonsense").returncode == 2
    assert script(tmp_path, "--rehearse", PARTS="nothing").returncode == 2


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


@needs_interpreter
def test_the_sanitized_calls_run():
    assert sanitize.call_kernels(CPU, True, time.monotonic() + 60) == 5
    assert sanitize.call_kernels(CPU, True, time.monotonic() - 1) == 0


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
    for fixed, outcome in (({}, "failed"), ({"FIXED": "1"}, "passed")):
        given = os.environ | fixed | {FILE: str(file), "PYTHONPATH": str(ROOT)}
        subprocess.run(command, cwd=tmp_path, env=given, capture_output=True)
        last = outcomes(read_rows(file))
        assert [row["outcome"] for row in last.values()] == ["passed", outcome]
    assert len(read_rows(file)) == 3


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


# The clock of a GPU, with a GPU that is made up.


class FakeGpu:
    """A queue that is held back for a while; a call takes ``python`` seconds to get into it and 3 ms to run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, python: float) -> None:
        self.held, self.python, self.clock = [], python, Clock(CPU)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.held.append(cycles / 2e9))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
        self.clock.cuda, self.clock.flush, self.clock.start, self.clock.stop = True, torch.zeros(1), self, self

    def query(self) -> bool:
        return self.held[-1] < self.python

    def elapsed_time(self, stop: FakeGpu) -> float:
        return 3.0

    def record(self) -> None: ...

    def synchronize(self) -> None: ...


@pytest.mark.parametrize(("python", "longest"), [(1e-3, 3e-3), (10.0, 0.05)])
def test_the_queue_is_held_until_the_whole_call_is_in_it_or_for_a_limited_time(monkeypatch, python, longest):
    gpu = FakeGpu(monkeypatch, python)
    timings, errors = gpu.clock.race({"a": lambda: None, "bad": lambda: 1 / 0}, rounds=7, seconds=0)
    assert 2 <= len(timings["a"].samples) <= 5 and timings["a"].row()["ms"] == 3.0 and "ZeroDivision" in errors["bad"]
    assert min(python, 0.05) <= gpu.held[-1] <= longest and timings["a"].wall_ms < 3.0
    assert gpu.clock.median_seconds(lambda: None) == 3e-3


def test_an_error_of_a_call_that_ran_before_means_that_the_device_is_lost(monkeypatch):
    gpu, calls_made = FakeGpu(monkeypatch, 0.0), []

    def breaks() -> None:
        calls_made.append(1)
        if len(calls_made) > 3:
            raise RuntimeError("an illegal memory access")

    with pytest.raises(DeviceLost, match="illegal"):
        gpu.clock.race({"a": breaks})


# Right and wrong answers.


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("op", OPS)
def test_the_dense_layer_is_right_and_any_wrong_element_is_not(op, dtype):
    scene = make_scene(CASE._replace(op=op, dtype=dtype), CPU)
    dense = contestants.cublas(scene, op)
    judge = Judge(scene, op)
    answer = dense.answer(dense.run())
    assert judge.wrong(answer, by_element=True) is None
    for name, tensor in answer.items():
        for value in (float("nan"), 50.0):
            bad = tensor.detach().clone()
            bad.view(-1)[-1] = value
            assert name in (judge.wrong(answer | {name: bad}, by_element=True) or "")
        assert "shape" in (judge.wrong(answer | {name: tensor[:-1]}, by_element=False) or "")


def test_a_wrong_answer_is_recorded_and_not_timed(part):
    def wrong(scene, op):
        dense = contestants.cublas(scene, op)
        return dataclasses.replace(dense, answer=lambda r: {k: 1.5 * v for k, v in dense.answer(r).items()})

    def breaks(scene, op):
        raise NotImplementedError("no such kernel")

    race.run_case(part, Clock(CPU), CASE, {"cublas": contestants.cublas, "liar": wrong, "none": breaks})
    rows = {row["key"]: row for row in part.results.rows}
    assert "of its norm" in rows[f"{CASE.key} | liar"]["refused"] and "ms" not in rows[f"{CASE.key} | liar"]
    assert rows[f"{CASE.key} | none"]["error"] == "NotImplementedError: no such kernel"
    assert rows[f"{CASE.key} | cublas"]["vs_dense"] == 1.0 and rows[CASE.key]["contestants"] == 1


@needs_interpreter
def test_the_tuner_writes_a_table_that_the_package_reads(part, monkeypatch):
    from sparsekern.kernels.gpu import tables
    from sparsekern.kernels.gpu.linear import FEW_TOKENS

    monkeypatch.setenv("SPARSEKERN_CACHE", str(part.out))
    monkeypatch.setattr(tune, "compile_side_by_side", lambda part: None)
    case = calls.calls(True)[1]
    which = calls.problem_of(case, CPU, FEW_TOKENS)
    tune.tune_one(part, Clock(CPU), which, case)
    assert tables.read(which) is not None and tables.choose is calls.tables.choose
    assert json.loads((part.out / "sm_90.json").read_text())["rehearsal"] is True
    candidates = [row for row in part.results.rows if "predicted" in row]
    assert len(candidates) == 2 and all(row["ms"] > 0 for row in candidates)
    assert min(candidates, key=lambda row: row["ms"])["config"] == part.results.rows[-1]["chosen"]


# The cases and the table.


def test_the_cases_are_those_that_were_asked_for_the_goals_first():
    cases = race.cases()
    assert len(cases) == len({case.key for case in cases})
    assert all(case.in_features % case.block == 0 and case.out_features % case.block == 0 for case in cases)
    assert {case.tokens for case in cases} == {16, 2048, 8192, 32768} and {case.dtype for case in cases} == {
        *("bf16", "fp16", "fp32")
    }
    assert {(c.block, c.sparsity) for c in cases[:8]} == {(b, s) for b in GOALS for s in (0.9, 0.95)}
    assert len({(case.in_features, case.out_features) for case in cases}) == 4


def test_break_even_is_where_the_sparse_layer_takes_as_long():
    assert break_even({0.5: 1 / 1.5, 0.9: 1 / 0.5}) == (pytest.approx(0.7), "=")
    assert break_even({0.5: 2.0, 0.9: 4.0}) == (0.5, "<")
    assert break_even({0.5: 0.2, 0.9: 0.4}) == (0.9, ">")
    assert break_even({}) is None
    assert [verdict(x, 2, 3) for x in (1.9, 2, 3)] == ["MISSED", "must reached", "aim reached"]


def test_the_table_makes_sense_of_whatever_is_there(tmp_path):
    text = "\n".join(table.lines(tmp_path))
    for missing in ("environment: not recorded", "tests: not run", "sanitizer: not run", "micro: not", "nothing tuned"):
        assert missing in text
    row = Case("step", "bf16", 8192, 4096, 4096, 64, 0.9)._asdict() | {
        "contestant": "sparsekern",
        "key": "x",
        "ms": 1.0,
    }
    row |= {"vs_dense": 4.5, "wall_vs_dense": 4.0, "vs_sparse": None, "tflops": 300.0, "part": "race"}
    (tmp_path / "race.jsonl").write_text(json.dumps(row) + "\n{cut")
    text = "\n".join(table.lines(tmp_path))
    assert "90% 4.50x | 4.00x of 4/5.5: must reached" in text and "break-even < 90% of <= 45%" in text
    assert "REHEARSAL" not in text and "not measured" in text
