"""Symbolic links in the place of every file and folder that a run, its page or a comparison makes: none is followed."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sparsekern.cli.main import application
from sparsekern.lab import Config, Interrupted, Observer, resume, start
from sparsekern.lab.compare import CompareObserver, Contestant, Plan, compare
from sparsekern.lab.lock import LOCK

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
    plan = Plan(CONFIG, (Contestant("static"),), (0.5,), (8,), dense=False)
    compare(plan, folder, CompareObserver())
    files = [path.name for path in folder.iterdir() if path.is_file()]
    assert sorted(files) == ["comparison.json", "comparison.md", "comparison.png", "plan.json"]
    for name in files:
        plant(folder / name, victims)
        plant(folder / f"{name}.unfinished", victims)
    compare(plan, folder, CompareObserver())
    assert not any((folder / name).is_symlink() for name in files)
    cell = next(path for path in folder.iterdir() if path.is_dir())
    plant(cell, victims)
    with pytest.raises(ValueError, match=f"{cell.name}: .*{cell.name} is a symbolic link"):
        compare(plan, folder, CompareObserver())
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
