from __future__ import annotations

from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from sparsekern.cli.method_options import takes_method_options
from sparsekern.lab.options import OPTIONS


@pytest.fixture
def command():
    """A command that has the options, and what it received."""
    received = []

    @takes_method_options
    def run(method: Annotated[str, typer.Option()] = "set", *, options: dict) -> None:
        """Do nothing."""
        received.append((method, options))

    app = typer.Typer()
    app.command()(run)
    return app, received


def test_only_what_is_given_arrives(command):
    app, received = command
    for arguments in ([], ["--method=gse", "--subset-factor", "2", "--with-replacement", "--scope=global"]):
        assert CliRunner().invoke(app, arguments).exit_code == 0
    assert received == [("set", {}), ("gse", {"subset_factor": 2.0, "with_replacement": True, "scope": "global"})]


def test_a_flag_can_be_taken_back(command):
    app, received = command
    CliRunner().invoke(app, ["--no-regrow"])
    assert received == [("set", {"regrow": False})]


def test_the_help_says_whose_an_option_is_and_its_default(command):
    text = CliRunner().invoke(command[0], ["--help"], env={"COLUMNS": "300"}).output
    lines = {word: line for line in text.splitlines() for word in line.split() if word.startswith("--")}
    assert {f"--{name.replace('_', '-')}" for name in OPTIONS} <= lines.keys()
    assert "[vrpge]" in lines["--masks"] and "(2)" in lines["--masks"]
    assert "(layer; vrpge: global)" in lines["--scope"] and "(2.0)" in lines["--pool"] and "(0.75)" in lines["--stop"]
    assert "(0.1)" in lines["--agent-gamma"] and "(losses)" in lines["--agent-estimate"]
    assert "default" not in lines["--score-tokens"] and "uniform, grabo, graest" in lines["--distribution"]


def test_a_word_where_a_number_must_be(command):
    result = CliRunner().invoke(command[0], ["--masks", "many"])
    assert result.exit_code == 2 and "masks" in result.output
