from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from sparsekern.cli.main import application
from sparsekern.cli.shell import (
    INTERRUPTED,
    USAGE,
    USAGE_ERROR,
    CtrlC,
    PlainConsole,
    error_console,
    explained,
    say,
    sentence,
)
from sparsekern.errors import InputError
from sparsekern.lab import Interrupted


def command(update_every: int, agent_gamma: float, width: int) -> None: ...


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("width is 0", parameter="width"), USAGE_ERROR, "error: width is 0\n"),
        (MemoryError(), USAGE_ERROR, "error: the memory does not suffice; choose a smaller width, batch size or data"),
        (RuntimeError("std::bad_alloc"), USAGE_ERROR, "error: the memory does not suffice"),
        (
            OSError(28, "No space left on device"),
            USAGE_ERROR,
            "error: there is no room left on the disk; free",
        ),
        (RuntimeError("PytorchStreamWriter failed writing file data/1"), USAGE_ERROR, "error: there is no room left"),
        (
            PermissionError(13, "Permission denied", "a/b"),
            USAGE_ERROR,
            "error: a/b cannot be used (Permission denied)",
        ),
        (OSError("odd"), USAGE_ERROR, "error: a file cannot be used (odd); check the path"),
        (Interrupted(Path("x")), INTERRUPTED, "saved: True\n"),
        (KeyboardInterrupt(), INTERRUPTED, "saved: False\n"),
    ],
)
def test_what_a_user_can_mend_is_one_line(capsys, error, code, line):
    with pytest.raises(typer.Exit) as stopped, explained(error_console(), lambda saved: f"saved: {saved}", command):
        raise error
    written = capsys.readouterr()
    assert stopped.value.exit_code == code and written.out == ""
    assert written.err.startswith(line) and written.err.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), ValueError("optimizer got an empty list")])
def test_a_defect_keeps_its_traceback(error):
    with pytest.raises(type(error), match=str(error)), explained(error_console(), lambda saved: "", command):
        raise error


def test_an_error_of_another_library_inside_a_command_is_a_defect(monkeypatch, tmp_path):
    def broken(*_):
        raise ValueError("a message of torch")

    monkeypatch.setattr("sparsekern.lab.train.build_method", broken)
    result = CliRunner().invoke(application(), ["train", "--quiet", "--out", str(tmp_path / "run")])
    assert isinstance(result.exception, ValueError) and result.exit_code == 1 and result.stderr == ""


@pytest.mark.parametrize(
    ("text", "parameter", "shown"),
    [
        ("update_every is 0", "update_every", "update_every is 0 (option --update-every)"),
        ("gamma is 2", "agent_gamma", "gamma is 2 (option --agent-gamma)"),
        ("width is 0", "width", "width is 0"),
        ("drop --update-every", "update_every", "drop --update-every"),
        ("process_group is 0", "process_group", "process_group is 0"),
    ],
)
def test_an_error_names_the_option_as_the_command_spells_it(capsys, text, parameter, shown):
    with pytest.raises(typer.Exit), explained(error_console(), lambda saved: "", command):
        raise InputError(text, parameter=parameter)
    assert capsys.readouterr().err == f"error: {shown}\n"


def test_a_batch_system_that_is_about_to_kill_asks_too():
    before = signal.getsignal(signal.SIGTERM)
    with CtrlC() as interrupt:
        signal.raise_signal(signal.SIGTERM)
        assert interrupt.asked() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_first_ctrl_c_asks_and_the_second_stops():
    before = signal.getsignal(signal.SIGINT)
    with CtrlC() as interrupt:
        assert not interrupt.asked()
        signal.raise_signal(signal.SIGINT)
        assert interrupt.asked()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_command_of_one_process_is_refused_by_the_first_of_several(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = []
    for rank, code in (("0", USAGE_ERROR), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        result = CliRunner().invoke(application(), ["compare", "--method", "set"])
        assert result.exit_code == code and result.stdout == ""
        said.append(result.stderr)
    assert said == [
        "error: WORLD_SIZE is 2, but sparsekern compare runs in one process; start it without torchrun\n",
        "",
    ]
    assert not any(tmp_path.iterdir())


def test_foreign_text_is_printed_and_not_obeyed(capsys):
    from rich.table import Table

    name = "[red]a[/nope]\x1b[2J :smile:"
    shown = r"[red]a[/nope]\x1b[2J :smile:"
    say(name)
    table = Table(name, title=name)
    table.add_row(name)
    PlainConsole(width=90).print(table)
    error_console().print(name)
    written = capsys.readouterr()
    assert written.out.count(shown) == 4 and written.err == f"{shown}\n"


@pytest.mark.parametrize("command", ["inspect \x1b[2J", "train --data \x1b[2J", "train --\x1b[2J", "\x1b[2J"])
def test_no_error_carries_an_escape_sequence(capfd, command):
    result = CliRunner().invoke(application(), command.split())
    assert result.exit_code == 2 and "\x1b" not in result.output and r"\x1b[2" in result.output


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["train", "--epochs", "ten"], "--epochs is 'ten'; it must be a whole number; "),
        (["train", "--epochs=ten"], "--epochs is 'ten'; it must be a whole number; "),
        (["train", "--rate", "1", "--rate", "fast"], "--rate is 'fast'; it must be a number; "),
        (
            ["compare", "--block-size=16", "--block-size=x", "--block-size=8"],
            "--block-size is 'x'; it must be a whole ",
        ),
        (["convert", "a", "b", "--to", "dens"], "--to is 'dens'; it must be one of dense, sparse, bsr; "),
        (["convert", "a", "b"], "missing option '--to', which is one of dense, sparse, bsr; "),
        (["train", "--epoch", "1"], "no such option: --epoch (Possible options: "),
        (["trian"], "no such command 'trian'. Did you mean 'train'?"),
        (["report"], "missing argument 'RUN'"),
        (["info", "extra"], "got unexpected extra argument"),
        (["train", "--rate"], "option '--rate' requires an argument"),
    ],
)
def test_an_error_of_usage_is_one_line(arguments, line):
    result = CliRunner().invoke(application(), arguments)
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.lower().startswith(f"error: {line}".lower()) and result.stderr.count("\n") == 1
    assert result.stderr.endswith(" --help shows what there is\n")


def test_without_a_command_the_help_is_shown():
    result = CliRunner().invoke(application(), [])
    assert result.exit_code == 0 and "train" in result.stdout


def test_the_arguments_of_the_process_are_the_default(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sparsekern", "info", "--odd"])
    with pytest.raises(SystemExit) as stopped:
        application()(prog_name="sparsekern")
    assert stopped.value.code == 2 and "no such option: --odd" in capsys.readouterr().err


def test_what_a_caller_asked_to_get_is_raised():
    with pytest.raises(USAGE):
        application()(["train", "--odd"], standalone_mode=False)


def test_an_error_without_a_command():
    assert sentence(typer.BadParameter("Too odd.")) == "invalid value: Too odd; sparsekern --help shows what there is"
