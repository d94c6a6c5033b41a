import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import sparsekern
from sparsekern.cli import main as module
from sparsekern.cli.main import application, main
from sparsekern.recipes import Config
from sparsekern.recipes.options import OPTIONS
from sparsekern.training import METHODS

ROOT = Path(__file__).parent.parent.parent


def test_version():
    result = CliRunner().invoke(application(), ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"sparsekern {sparsekern.__version__}\n")


def test_train_is_a_sub_command():
    assert "train" in CliRunner().invoke(application(), []).output
    assert CliRunner().invoke(application(), ["--quiet"]).exit_code == 2


def test_help_names_every_option():
    text = CliRunner().invoke(application(), ["train", "--help"], terminal_width=200, env={"COLUMNS": "200"}).output
    names = (Config().to_json().keys() - {"options"}) | OPTIONS.keys()
    options = [name.replace("_", "-") for name in names]
    for option in (*options, "out", "resume", "json", "quiet"):
        assert f"--{option}" in text
    assert "2048" in text and ", ".join(METHODS) in text


@pytest.mark.parametrize("command", [["-m", "sparsekern"], ["-m", "sparsekern.cli.main"]])
def test_as_a_module(command):
    done = subprocess.run([sys.executable, *command, "--version"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"sparsekern {sparsekern.__version__}\n")


@pytest.mark.parametrize(("absent", "named"), [("typer", "typer"), ("sklearn", "scikit-learn"), ("rich", "rich")])
def test_a_missing_package_is_named_with_its_extra(monkeypatch, capsys, absent, named):
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == absent else find_spec(name))
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert f"needs {named}; run: pip install 'sparsekern[demo]'" in capsys.readouterr().err


def test_tiny_numbers_are_flushed_and_freed_memory_is_kept(monkeypatch):
    done = []
    monkeypatch.setattr(torch, "set_flush_denormal", lambda on: done.append(("flush", on)))
    monkeypatch.setattr(sparsekern, "keep_freed_memory", lambda: done.append("keep"))
    monkeypatch.setattr(module, "application", lambda: lambda prog_name: done.append(prog_name))
    main()
    assert done == [("flush", True), "keep", "sparsekern"]


def test_without_typer_nothing_is_imported_that_needs_it():
    code = """
import sys
class Refuse:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in ("typer", "rich"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse)
import sparsekern.cli.main
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
