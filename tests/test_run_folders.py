"""Runs on disk: links that somebody planted, full disks, processes that are killed, and files that are damaged."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy
import pytest
from typer.testing import CliRunner

from sparsekern.cli.main import application
from sparsekern.lab import Config, Interrupted, Observer, resume, start
from sparsekern.lab.compare import Plan, compare
from sparsekern.lab.store import LOCK

CONFIG = Config(width=32, block_size=8, sparsity=0.5, epochs=2, batch_size=400, seeds=1, device="cpu")


class StopAt(Observer):
    def __init__(self, step: int) -> None:
        self.left = step

    def should_stop(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.fixture
def victims(tmp_path):
    """A folder whose content must stay as it is: its paths and contents."""
    folder = tmp_path / "victims"
    (folder / "folder" / "step-00000001").mkdir(parents=True)
    for name in ("file", "folder/file", "folder/step-00000001/file"):
        (folder / name).write_text("mine")
    return folder


def content(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def plant(path: Path, victims: Path) -> None:
    """Put a link in the place of a file or folder, or where there is nothing."""
    is_folder = path.is_dir() and not path.is_symlink()
    if is_folder:
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(victims / ("folder" if is_folder else "file"))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(Interrupted):
        start(CONFIG, folder, StopAt(9))
    return folder


@pytest.fixture
def run(stopped, tmp_path):
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def report(folder):
    return CliRunner().invoke(application(), ["report", str(folder), "--no-measure"], catch_exceptions=False)


def test_files_of_a_run(run, victims, tmp_path):
    before, names = content(victims), {path.name for path in run.iterdir()}
    for name in ("metrics.jsonl", "summary.png", "spectral.png", "results.json"):
        plant(run / f"{name}.unfinished", victims)
    plant(run / "metrics.jsonl", victims)
    for name in ("summary.png", "spectral.png", "results.json"):  # what is there, if by a link, is not made anew
        (run / name).symlink_to(victims / "none")
    for name in (".unfinished", ".deleted"):
        plant(run / "checkpoints" / "seed-0" / name, victims)
    resume(run, Observer())
    for name in ("report.html", "report.html.unfinished"):
        plant(run / name, victims)
    assert report(run).exit_code == 2, "what is there is no page"
    os.remove(run / "report.html")
    (run / "report.html").symlink_to(victims / "none")
    assert report(run).exit_code == 0
    assert content(victims) == before
    made = {path.name for path in run.iterdir() if not path.is_symlink()}
    assert made == names | {"metrics.jsonl", "summary.png", "results.json", "report.html"}


@pytest.mark.parametrize("name", [LOCK, "checkpoints", "checkpoints/seed-0"])
def test_a_lock_and_folders_of_a_run(run, victims, name):
    before = content(victims)
    plant(run / name, victims)
    with pytest.raises(ValueError, match=f"{name} is a symbolic link, and files are not written through links"):
        resume(run, Observer())
    (run / name).unlink()
    (run / name).symlink_to(victims / "none")
    with pytest.raises(ValueError, match=f"{name} is a symbolic link"):
        resume(run, Observer())
    assert content(victims) == before


def test_a_link_in_place_of_a_checkpoint_is_deleted_in_its_turn(run, victims):
    before = content(victims)
    (old := run / "checkpoints" / "seed-0" / "step-00000001").symlink_to(victims / "folder")
    resume(run, Observer())
    assert not old.is_symlink() and content(victims) == before


def test_a_new_run_in_a_folder_with_a_planted_lock(tmp_path, victims):
    before = content(victims)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(victims / "none")
    with pytest.raises(ValueError, match=r"\.lock is a symbolic link"):
        start(CONFIG, tmp_path / "run", Observer())
    assert content(victims) == before


def test_files_and_folders_of_a_comparison(tmp_path, victims, monkeypatch):
    monkeypatch.setattr("sparsekern.lab.compare.training_cost", lambda *_: {"training_flops": 8, "peak_bytes": 9})
    before, folder = content(victims), tmp_path / "comparison"
    plan = Plan(CONFIG, (Config(method="static"),), (0.5,), (8,), dense=False)
    compare(plan, folder, Observer())
    files = [path.name for path in folder.iterdir() if path.is_file()]
    assert sorted(files) == ["comparison.json", "comparison.md", "comparison.png", "plan.json"]
    for name in files:
        plant(folder / name, victims)
        plant(folder / f"{name}.unfinished", victims)
    compare(plan, folder, Observer())
    assert not any((folder / name).is_symlink() for name in files)
    cell = next(path for path in folder.iterdir() if path.is_dir())
    plant(cell, victims)
    with pytest.raises(ValueError, match=f"{cell.name}: .*{cell.name} is a symbolic link"):
        compare(plan, folder, Observer())
    assert content(victims) == before


@pytest.mark.parametrize("name", ["target.safetensors", "target.pt"])
def test_the_file_that_convert_writes(run, victims, tmp_path, name):
    before = content(victims)
    target = tmp_path / name
    target.symlink_to(victims / "none")
    arguments = ["convert", str(run), str(target), "--to", "dense"]
    refused = CliRunner().invoke(application(), arguments, catch_exceptions=False)
    assert refused.exit_code == 2 and "which exists; choose another name, or --force" in refused.output
    assert CliRunner().invoke(application(), [*arguments, "--force"], catch_exceptions=False).exit_code == 0
    assert content(victims) == before and not target.is_symlink()


# Full disks.

TINY = ["train", "--width=64", "--epochs=3", "--seeds=1", "--no-dense", "--quiet", "--batch-size=720"]
TINY += ["--block-size=16", "--device=cpu"]


def assert_told_of_a_full_disk(result) -> None:
    assert result.exit_code == 2 and result.stdout == "" and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: there is no room left on the disk; free some. ")


@pytest.mark.parametrize("writes", [0, 1, 5])
def test_a_disk_that_is_full(tmp_path, monkeypatch, writes):
    done = []

    def sync(handle: int) -> None:
        done.append(handle)
        if len(done) > writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("sparsekern.lab.run.draw_summary", lambda *_: None)
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", sync)
        result = CliRunner().invoke(application(), [*TINY, "--out", str(tmp_path / "run")])
    assert_told_of_a_full_disk(result)
    if (tmp_path / "run" / "config.json").is_file():
        assert "--resume" in result.stderr
        again = CliRunner().invoke(application(), ["train", "--resume", str(tmp_path / "run"), "--json", "--quiet"])
        assert again.exit_code == 0 and json.loads(again.stdout)["networks"]["sparse"]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_disk_that_is_really_full(small_disk):
    result = CliRunner().invoke(application(), [*TINY, "--out", str(small_disk / "run")])
    assert_told_of_a_full_disk(result)
    assert "--resume" in result.stderr and (small_disk / "run" / "config.json").is_file()


def test_names_with_spaces_and_other_letters_are_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr("sparsekern.lab.run.draw_summary", lambda *_: None)
    folder = tmp_path / "ein Lauf: 90 % ü 模型 'x' \"y\""
    data = tmp_path / "dä ta.npz"
    labels, images = numpy.arange(40) % 2, numpy.arange(40 * 64, dtype="uint8").reshape(40, 8, 8)
    numpy.savez(data, train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = CliRunner().invoke(application(), [*TINY, "--data", str(data), "--out", str(folder), "--json"])
    assert result.exit_code == 0 and json.loads(result.stdout)["folder"] == str(folder)
    page = CliRunner().invoke(application(), ["report", str(folder), "--no-measure"])
    assert page.exit_code == 0 and (folder / "report.html").is_file()


# A cheap sample of ``make soak``.


def soak(program: str, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", f"tests.soak.{program}", *options],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the harness forks")
def test_killed_runs_end_like_those_left_alone():
    out = soak("kills", "--kills", "5")
    assert " 5  kills\n" in out and "0  differences" in out


@pytest.mark.skipif(sys.platform != "linux", reason="bounds memory as Linux does")
def test_readers_read_or_say_why_not():
    out = soak("readers", "--inputs", "25")
    assert "each was read, or refused in one sentence" in out and out.count(" refused\n") == 10
