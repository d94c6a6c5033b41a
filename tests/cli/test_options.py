from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from sparsekern.cli.options import (
    RUN_OPTIONS,
    absolute,
    expanded,
    given,
    of_recipe,
    option,
    sparsity_of,
    takes_method_options,
    takes_network_options,
    takes_run_options,
)
from sparsekern.errors import InputError
from sparsekern.lab import Config
from sparsekern.lab.options import OPTIONS


def test_a_path_means_the_same_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute("a/../x.npz") == str(tmp_path / "x.npz") and absolute(None) is None
    assert absolute("~/x") == str(Path.home() / "x")


def test_the_default_of_what_the_recipe_decides():
    assert of_recipe("batch_size") == "the recipe's; mlp: 64"


def test_every_option_is_of_a_run_and_arrives_if_it_is_given():
    assert {*RUN_OPTIONS} < {field.name for field in fields(Config)}
    received = []
    app = typer.Typer()
    app.command()(takes_run_options(lambda *, values: received.append(values)))
    assert CliRunner().invoke(app, ["--no-dense", "--width=32", "--rate", "0.5"]).exit_code == 0
    assert received == [{"width": 32, "rate": 0.5, "dense": False}]


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


@pytest.fixture
def methods_command():
    """A command that has the options, and what it received."""
    received = []

    @takes_method_options
    def run(method: Annotated[str, typer.Option()] = "set", *, options: dict) -> None:
        """Do nothing."""
        received.append((method, options))

    app = typer.Typer()
    app.command()(run)
    return app, received


def test_only_what_is_given_arrives(methods_command):
    app, received = methods_command
    for arguments in ([], ["--method=gse", "--subset-factor", "2", "--with-replacement", "--scope=global"]):
        assert CliRunner().invoke(app, arguments).exit_code == 0
    assert received == [("set", {}), ("gse", {"subset_factor": 2.0, "with_replacement": True, "scope": "global"})]


def test_a_flag_can_be_taken_back(methods_command):
    app, received = methods_command
    CliRunner().invoke(app, ["--no-regrow"])
    assert received == [("set", {"regrow": False})]


def test_the_help_says_whose_an_option_is_and_its_default(methods_command):
    text = CliRunner().invoke(methods_command[0], ["--help"], env={"COLUMNS": "300"}).output
    lines = {word: line for line in text.splitlines() for word in line.split() if word.startswith("--")}
    assert {f"--{name.replace('_', '-')}" for name in OPTIONS} <= lines.keys()
    assert "[vrpge]" in lines["--masks"] and "(2)" in lines["--masks"]
    assert "(layer; vrpge: global)" in lines["--scope"] and "(2.0)" in lines["--pool"] and "(0.75)" in lines["--stop"]
    assert "(0.1)" in lines["--agent-gamma"] and "(losses)" in lines["--agent-estimate"]
    assert "default" not in lines["--score-tokens"] and "uniform, grabo, graest" in lines["--distribution"]


def test_a_word_where_a_number_must_be(methods_command):
    result = CliRunner().invoke(methods_command[0], ["--masks", "many"])
    assert result.exit_code == 2 and "masks" in result.output


@pytest.mark.parametrize(
    ("texts", "value"),
    [(None, None), ([], None), (["0.9"], 0.9), (["mlp=0.9", "attention=.7"], {"mlp": 0.9, "attention": 0.7})],
)
def test_a_sparsity_is_a_number_or_one_for_each_kind(texts, value):
    assert sparsity_of(texts) == value


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["much"], "sparsity is 'much'; it must be a number such as 0.9"),
        (["mlp="], "sparsity is 'mlp='; it must be a number"),
        (["0.9", "0.8"], "sparsity is given 2 times; give one number, or one for each kind"),
        (["0.9", "mlp=0.8"], "sparsity is given 2 times"),
        (["mlp=0.9", "mlp=0.8"], "sparsity is given 2 times"),
    ],
)
def test_a_sparsity_that_is_neither(texts, words):
    with pytest.raises(InputError, match=words):
        sparsity_of(texts)


def test_options_of_networks_say_whose_they_are():
    received = []

    @takes_network_options
    def run(*, network: dict) -> None:
        """Do nothing."""
        received.append(network)

    app = typer.Typer()
    app.command()(run)
    text = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output
    assert "gpt: 6; gpt-nano: 3" in text and "gelu, swiglu" in text
    assert CliRunner().invoke(app, ["--depth=2", "--free-head"]).exit_code == 0
    assert received == [{"depth": 2, "free_head": True}]
