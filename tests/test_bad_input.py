"""What a user does wrong ends in the exact exception and one sentence; on the command line in exit code 2 and nothing
overwritten. The tables are in ``bad_input.py`` and ``bad_commands.py``."""

from __future__ import annotations

import hashlib
import shlex
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import sparsekern as sk
from sparsekern.cli.main import application
from sparsekern.errors import InputError
from sparsekern.lab import Config
from sparsekern.lab.data import load
from sparsekern.lab.store import create
from tests.bad_commands import COMMANDS
from tests.bad_input import CASES, NAMES


def test_the_parameter_is_an_attribute():
    with pytest.raises(InputError, match=r"^sparsity is 1\.5") as caught:
        sk.SparseLinear(64, 64, sparsity=1.5)
    assert caught.value.parameter == "sparsity"
    assert isinstance(caught.value, ValueError)


def test_no_case_is_twice():
    for names in ([call for call, *_ in CASES], [command for command, _ in COMMANDS]):
        assert sorted(names) == sorted(set(names)) and len(names) >= 75


@pytest.mark.parametrize(("call", "error", "says"), [(c, e, s) for c, e, *s in CASES], ids=[c[0] for c in CASES])
def test_the_library(call, error, says):
    with pytest.raises(Exception) as raised:
        eval(call, NAMES.copy())
    assert type(raised.value) is (InputError if error is ValueError else error), raised.value
    text = str(raised.value)
    if error is RuntimeError and text.startswith("Error(s) in loading"):  # load_state_dict's own heading
        text = text.partition("\n\t")[2]
    assert [part for part in says if part not in text] == [], text
    assert "\n" not in text and 10 < len(text) < 420, text


def images(count: int, side: int = 8) -> numpy.ndarray:
    return numpy.arange(count * side * side, dtype="uint8").reshape(count, side, side)


def fill(place: Path) -> None:
    """Make the folders and files of the table."""
    sets = {"train_images": images(8), "train_labels": numpy.arange(8) % 2}
    sets |= {"test_images": images(4), "test_labels": numpy.arange(4) % 2}
    numpy.savez(place / "small.npz", **sets)
    numpy.savez(place / "nothing-to-test.npz", **sets | {"test_images": images(0), "test_labels": numpy.arange(0)})
    numpy.savez(place / "ä b.npz", **sets | {"train_labels": numpy.zeros(8, dtype=int)})
    numpy.savez(place / "inf.npz", **sets | {"test_images": numpy.full((4, 8, 8), numpy.inf)})
    (place / "text.npz").write_text("not data")
    (place / "broken.tar.gz").write_bytes(b"\x1f\x8b junk")
    (place / "notes.txt").write_text("mine")
    (place / "full").mkdir()
    (place / "full" / "notes.txt").write_text("mine")
    config = Config(width=32, block_size=8, epochs=2, seeds=1, device="cpu").resolved(1438)
    digits = load().describe()
    for name, data in (("run", digits), ("moved", digits | {"name": "elsewhere"}), ("cut-metrics", digits)):
        create(place / name, config, data, {})
    (place / "cut-metrics" / "metrics.jsonl").write_text('{"netw\n{}\n')
    create(place / "grid" / "set", config, {}, {})
    (place / "grid" / "plan.json").write_text("{}")
    save_file({"fc.weight": torch.ones(8, 8)}, place / "w.safetensors")
    (place / "full.pt").mkdir()
    create(place / "first-format", config, load().describe(), {})
    text = (place / "first-format" / "config.json").read_text()
    (place / "first-format" / "config.json").write_text(text.replace('"format_version": 4', '"format_version": 1'))
    create(place / "cut-results", config, load().describe(), {})
    (place / "cut-results" / "results.json").write_text('{"format_version": 4, "config": {}}')
    (place / "no-plan").mkdir()
    (place / "no-plan" / "plan.json").write_text('{"format_version": 4}')
    create(place / "odd-data", config, "digits", {})
    for name, content in (("junk", "{"), ("newer", '{"format_version": 99}'), ("odd", '{"format_version": 4}')):
        (place / name).mkdir()
        (place / name / "config.json").write_text(content)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("a place")
    fill(folder)
    return folder


def tree(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in folder.rglob("*")
    }


def run(command: str, place: Path):
    arguments = [part.replace("{place}", str(place)) for part in shlex.split(command.replace("ä b", "'ä b'"))]
    return CliRunner().invoke(application(), arguments, env={"COLUMNS": "120"})


@pytest.mark.parametrize(("command", "says"), COMMANDS[1:], ids=[command[:60] for command, _ in COMMANDS[1:]])
def test_the_command_line(command, says, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = [] if "--out" in command or "--resume" in command or not command.startswith("train") else ["--out", "new"]
    before = tree(place)
    result = run(" ".join([command, *out]), place)
    line = result.stderr.replace(str(place), "{place}")
    assert result.exit_code == 2 and result.stdout == "", (result.output, result.exception)
    assert isinstance(result.exception, SystemExit), result.exception
    assert line.startswith("error: ") and line.count("\n") == 1, line
    assert [part for part in says if part.lower() not in line.lower()] == [], line
    assert tree(place) == before
    assert (tmp_path / "new").exists() == ("1e30" in command), "nothing is begun but what fails later"
