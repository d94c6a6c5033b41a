import os
import runpy
import signal
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
from sparsekern.lab import Config
from sparsekern.lab.options import NETWORK_OPTIONS, OPTIONS
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
    names = (Config().to_json().keys() - {"options", "network"}) | OPTIONS.keys() | NETWORK_OPTIONS.keys()
    options = [name.replace("_", "-") for name in names]
    for option in (*options, "out", "resume", "json", "quiet"):
        assert f"--{option}" in text
    assert "2048" in text and ", ".join(METHODS) in text


@pytest.fixture
def harmless(monkeypatch):
    """Keep what a command sets for its whole process."""
    monkeypatch.setattr(torch, "set_flush_denormal", lambda on: None)
    monkeypatch.setattr(sparsekern, "keep_freed_memory", lambda: None)
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("name", ["sparsekern", "sparsekern.cli.main"])
def test_as_a_module(harmless, monkeypatch, capsys, name):
    monkeypatch.setattr(sys, "argv", [name, "--version"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(name, run_name="__main__")
    assert (stopped.value.code, capsys.readouterr().out) == (0, f"sparsekern {sparsekern.__version__}\n")


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


def test_without_typer_nothing_is_imported_that_needs_it_and_a_program_keeps_its_ctrl_c():
    code = """
import signal, sys
class Refuse:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in ("typer", "rich"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse)
before = signal.getsignal(signal.SIGINT)
import sparsekern
assert signal.getsignal(signal.SIGINT) is before
import sparsekern.cli.main
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("command", [["-m", "sparsekern"], [str(Path(sys.executable).parent / "sparsekern")]])
def test_ctrl_c_while_pytorch_is_imported_ends_the_command_without_a_traceback(tmp_path, command):
    """A module named ``torch`` stands before the real one and presses Ctrl-C in the middle of its import."""
    if not command[0].startswith("-") and not Path(command[0]).is_file():
        pytest.skip("the script sparsekern is not installed beside this interpreter")
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n")
    done = subprocess.run(
        [sys.executable, *command, "info"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_ctrl_c_is_python_s_own_again_when_a_command_runs(harmless, monkeypatch):
    seen = []
    monkeypatch.setattr(module, "application", lambda: lambda prog_name: seen.append(signal.getsignal(signal.SIGINT)))
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    main()
    assert seen == [signal.default_int_handler]
