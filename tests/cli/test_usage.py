import sys

import pytest
import typer
from typer.testing import CliRunner

from sparsekern.cli.main import application
from sparsekern.cli.usage import USAGE, sentence


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["train", "--epochs", "ten"], "--epochs is 'ten'; it must be a whole number; "),
        (["train", "--epochs=ten"], "--epochs is 'ten'; it must be a whole number; "),
        (["train", "--rate", "1", "--rate", "fast"], "--rate is 'fast'; it must be a number; "),
        (["convert", "a", "b", "--to", "dens"], "--to is 'dens'; it must be one of dense, sparse, bsr; "),
        (["convert", "a", "b"], "missing option '--to', which is one of dense, sparse, bsr; "),
        (["train", "--epoch", "1"], "no such option: --epoch"),
        (["trian"], "no such command 'trian'"),
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
