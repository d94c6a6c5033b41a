"""bench/gpu_run.sh itself: its calls, limits, archive, exit codes and signals; its parts are tested beside it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench.gpu import race
from bench.gpu.results import read_rows

ROOT = Path(__file__).parent.parent
REHEARSED = "race"
"""The part whose rehearsal is run as a whole: each new process costs seconds."""

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the rehearsal is for machines without a GPU")

MOST_FILES, MOST_BYTES = 8, 16 * 2**20
"""What a call may bring back."""


def script(out: Path, *words: str, root: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    given = os.environ | {"OUT": str(out), "KERNELS": str(out.parent / "kernels"), "PYTHON": sys.executable}
    given |= {"PYTHONPATH": ""} | environment
    given.pop("TRITON_INTERPRET", None)
    return subprocess.run(["bench/gpu_run.sh", *words], cwd=root, env=given, capture_output=True, text=True)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files without their history, as it is sent to a machine with a GPU."""
    root = tmp_path_factory.mktemp("copy")
    for folder in ("bench", "kernels", "sparsekern"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so", "out"))
    return root


@pytest.fixture(scope="module")
def rehearsal(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    out = tmp_path_factory.mktemp("rehearsal") / "out"
    return out, script(out, "second", "--rehearse", root=copy, PARTS=REHEARSED, COMMIT="abc1234")


# The whole.


def test_a_rehearsal_runs_its_parts_and_says_that_its_times_mean_nothing(rehearsal):
    out, ran = rehearsal
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert {"environment.json", "race.jsonl", "second.tar.gz"} == {path.name for path in out.iterdir()}
    with tarfile.open(out / "second.tar.gz") as archive:
        names = archive.getnames()
        table = archive.extractfile("table.txt").read().decode()
    assert {"results/environment.json", "results/race.jsonl"} <= set(names)
    assert ran.stdout.endswith(table)
    assert table.splitlines()[0].startswith("*** REHEARSAL") and len(table.splitlines()) <= 40


def test_every_row_says_what_it_was_measured_with(rehearsal):
    for path in rehearsal[0].glob("*.jsonl"):
        for row in read_rows(path):
            if not row.get("begun"):
                assert row["rehearsal"] is True and row["device"] == "cpu (Triton interpreter)"
                assert {"torch", "triton", "date", "part"} <= row.keys() and row["commit"] == "abc1234"


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


def test_a_second_run_measures_nothing_again_and_other_results_are_not_mixed_in(rehearsal, copy):
    out, _ = rehearsal
    before = (out / "race.jsonl").read_text()
    ran = script(out, "second", "--rehearse", root=copy, PARTS=REHEARSED, COMMIT="abc1234")
    assert ran.returncode == 0 and ran.stdout.count(": complete") == 1
    assert (out / "race.jsonl").read_text() == before
    refused = script(out, "second")
    assert refused.returncode == 2 and "holds a rehearsal" in refused.stderr
    refused = script(out, "second", "--rehearse", root=copy, PARTS=REHEARSED, COMMIT="another")
    assert refused.returncode == 2 and "race.jsonl has results of commit abc1234" in refused.stderr


# The script alone, with a Python that is made up.

FAKE = """#!/usr/bin/env bash
case "$2" in
  *environment) echo "$@" > "$OUT/../asked"; echo '{}' > "$OUT/environment.json"; exit "${ENVIRONMENT:-0}" ;;
  *table) echo "the table" ;;
  *) echo "${@:2}" >> "$OUT/../parts"; eval "$PART" ;;
esac
"""

DONE = """
case "$2" in
  *smoke) mkdir -p "$TRITON_CACHE_DIR"; echo compiled > "$TRITON_CACHE_DIR/kernel"; name=smoke ;;
  *run_tests) mkdir -p "$TRITON_CACHE_DIR"; echo compiled > "$TRITON_CACHE_DIR/kernel"; name=tests ;;
  *untuned) mkdir -p "$OUT/untuned"; name=untuned/untuned ;;
  *race_conv2d) name=conv2d ;;
  *counters) echo '{}' > "$OUT/counters.json"; exit ;;
  *sanitize) echo '{"failed": false}' > "$OUT/sanitizer.json"; exit ;;
  *tune) echo '{}' > "$OUT/sm_90.json"; name=tune ;;
  *) name=${2##*.} ;;
esac
echo "$ROW" '{"done": true}' > "$OUT/$name.jsonl"
"""


@pytest.fixture
def fake(tmp_path: Path) -> dict[str, str]:
    """The environment of a run in which PART is what a part does, and ENVIRONMENT the exit code of the first one."""
    python = tmp_path / "python"
    python.write_text(FAKE)
    python.chmod(0o755)
    return {"PYTHON": str(python)}


def files(out: Path) -> list[Path]:
    return sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file())


def test_both_calls_bring_back_few_files_and_the_second_one_what_the_first_compiled(tmp_path, fake):
    first, second = tmp_path / "one" / "out", tmp_path / "two" / "out"
    for out, call, more in ((first, "first", {}), (second, "second", {"FROM": str(first / "first.tar.gz")})):
        ran = script(out, call, **fake, PART=DONE, **more)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        assert len(files(out)) <= MOST_FILES and all(len(path.parts) <= 2 for path in files(out))
        assert all((out / path).stat().st_size <= MOST_BYTES for path in files(out))
        assert ran.stdout.endswith("the table\n") and "without TMA" not in ran.stdout
    assert Path("untuned/untuned.jsonl") in files(first) and Path("race.jsonl") not in files(first)
    assert (tmp_path / "two/kernels/timed/kernel").read_text() == "compiled\n"
    assert not (tmp_path / "two/kernels/tests").exists(), "what only the tests need is not carried"


def test_a_part_that_fails_stops_no_other_and_is_named_at_the_end(tmp_path, fake):
    out = tmp_path / "out"
    ran = script(out, "first", **fake, PART="[[ $2 != *micro ]]", PARTS="micro untuned")
    assert ran.returncode == 1 and "== untuned (" in ran.stdout
    assert ran.stdout.endswith("the table\nFAILED: micro\n") and (out / "first.tar.gz").is_file()


def test_a_part_that_hangs_is_stopped_and_what_it_wrote_is_in_the_archive(tmp_path, fake):
    out = tmp_path / "out"
    hangs = '[[ $2 == *smoke ]] && { echo "{}" > "$OUT/smoke.jsonl"; trap "" TERM; sleep 60; }; true'
    began = time.monotonic()
    ran = script(out, "first", **fake, PART=hangs, PARTS="smoke micro", TOTAL_SECONDS="17")
    assert time.monotonic() - began < 30 and ran.returncode == 1
    assert "== smoke: killed" in ran.stdout and ran.stdout.endswith(
        "not complete, run again to go on: micro\nFAILED: smoke\n"
    )
    with tarfile.open(out / "first.tar.gz") as archive:
        assert "results/smoke.jsonl" in archive.getnames()


def test_a_part_that_is_stopped_when_all_is_written_is_complete(tmp_path, fake):
    part = 'echo \'{"done": true}\' > "$OUT/micro.jsonl"; exit 124'
    ran = script(tmp_path / "out", "first", **fake, PART=part, PARTS="micro")
    assert ran.returncode == 0 and "FAILED" not in ran.stdout


@pytest.mark.parametrize(
    ("row", "without"), [('{"key": "tma 64, dx", "error": "x"}', True), ('{"key": "tma 64"}', False)]
)
def test_after_a_wrong_answer_by_the_copy_engine_it_is_done_without(tmp_path, fake, row, without):
    ran = script(tmp_path / "out", "first", **fake, PART=DONE, ROW=row + "\n", PARTS="smoke untuned")
    asked = (tmp_path / "parts").read_text().splitlines()
    assert ran.returncode == 0 and "--no-tma" not in asked[0] and ("--no-tma" in asked[1]) is without


@pytest.mark.parametrize(
    ("code", "said"),
    [(124, "micro: out of time"), (137, "micro: killed"), (3, "run again to go on: micro"), (1, "FAILED, exit code 1")],
)
def test_how_a_part_ended_is_told(tmp_path, fake, code, said):
    ran = script(tmp_path / "out", "first", **fake, PARTS="micro", PART=f"exit {code}")
    assert said in ran.stdout and ran.returncode == (0 if code == 3 else 1)


def test_a_crash_is_tried_again_in_a_new_process(tmp_path, fake):
    part = '[ -e "$OUT/again" ] || { touch "$OUT/again"; exit 139; }'
    ran = script(tmp_path / "out", "first", **fake, PARTS="micro", PART=part)
    assert ran.returncode == 0 and "exit code 139, again" in ran.stdout


def test_without_a_gpu_nothing_is_begun(tmp_path):
    ran = script(tmp_path / "out", "first")
    assert ran.returncode == 2 and "--rehearse" in ran.stderr
    assert "smoke" not in ran.stdout and "micro" not in ran.stdout


def test_force_begins_anew_with_the_parts_that_were_asked_for(tmp_path, fake):
    assert script(tmp_path / "out", "first", "--force", **fake, PART="true", PARTS="micro untuned").returncode == 0
    asked = (tmp_path / "asked").read_text()
    assert "--parts micro untuned" in asked and "--force" in asked


@pytest.mark.parametrize(
    ("words", "environment", "said"),
    [
        ([], {}, "say which call: first or second"),
        (["first", "--nonsense"], {}, "there is no option '--nonsense'"),
        (["first"], {"PARTS": "micro race"}, "the first call has no part 'race'"),
        (["first"], {"BUDGET_PERCENT": "ten"}, "BUDGET_PERCENT is 'ten'"),
        (["first"], {"TOTAL_SECONDS": "0"}, "TOTAL_SECONDS is '0'"),
        (["second"], {"FROM": "/nowhere"}, "FROM is '/nowhere', which is no file"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_runs(tmp_path, fake, words, environment, said):
    ran = script(tmp_path / "out", *words, **fake | environment)
    assert ran.returncode == 2 and ran.stdout == "" and said in ran.stderr


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_the_script_explains_itself(tmp_path, word):
    ran = script(tmp_path / "out", word)
    assert ran.returncode == 0 and "BUDGET_PERCENT" in ran.stdout and "130 if it was interrupted" in ran.stdout
    assert "set -euo" not in ran.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_everything_and_tells_how_to_go_on(tmp_path, fake, number):
    part = 'sleep 60 & echo $! > "$OUT/new"; mv "$OUT/new" "$OUT/pid"; wait'
    given = os.environ | {"OUT": str(tmp_path), "KERNELS": str(tmp_path / "kernels"), "PART": part} | fake
    given.pop("TRITON_INTERPRET", None)
    ran = subprocess.Popen(
        ["bench/gpu_run.sh", "first"],
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
