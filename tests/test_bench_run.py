"""bench/gpu_run.sh: the rehearsal, what it refuses, and how it is interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench.gpu import race
from bench.gpu.results import read_rows

ROOT = Path(__file__).parent.parent
REHEARSED = "race"  # the others are rehearsed in tests/test_bench_gpu.py: each new process costs seconds

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the rehearsal is for machines without a GPU")


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
