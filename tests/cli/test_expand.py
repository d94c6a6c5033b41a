from __future__ import annotations

from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from sparsekern.cli.expand import expanded, given, option


def test_false_is_given_and_none_is_not():
    assert given(dense=False, width=None, seeds=2) == {"dense": False, "seeds": 2}


@pytest.fixture
def command():
    """A command with two groups of options, and what it received."""
    received = []

    def run(first: Annotated[str, typer.Option()] = "a", *, one: dict, last: bool = False, two: dict) -> None:
        """Do nothing."""
        received.append((first, one, last, two))

    numbers = {"count": Annotated[int | None, option("How many.", 7)]}
    texts = {"name": Annotated[str | None, option("Of whom.", "nobody", "--name", "-n")]}
    app = typer.Typer()
    app.command()(expanded(expanded(run, "one", numbers), "two", texts))
    return app, received


def test_each_group_receives_its_own_that_were_given(command):
    app, received = command
    for arguments in ([], ["--count=3", "-n", "x", "--first", "b", "--last"]):
        assert CliRunner().invoke(app, arguments).exit_code == 0
    assert received == [("a", {}, False, {}), ("b", {"count": 3}, True, {"name": "x"})]


def test_the_help_has_them_in_the_place_of_the_parameter(command):
    text = CliRunner().invoke(command[0], ["--help"], env={"COLUMNS": "200"}).output
    places = [text.index(f"--{name}") for name in ("first", "count", "last", "name")]
    assert places == sorted(places) and "(7)" in text and "(nobody)" in text
