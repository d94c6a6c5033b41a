from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from sparsekern.cli.options import METHOD, NETWORK, RUN, absolute, given, option, sparsity_of, takes
from sparsekern.errors import InputError
from sparsekern.lab.options import OPTIONS


def test_a_path_means_the_same_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute("a/../x.npz") == str(tmp_path / "x.npz") and absolute(None) is None
    assert absolute("~/x") == str(Path.home() / "x")


def test_false_is_given_and_none_is_not():
    assert given(dense=False, width=None, seeds=2) == {"dense": False, "seeds": 2}


@pytest.fixture
def command():
    """A command with groups of options, and what it received."""
    received = []
    numbers = {"count": Annotated[int | None, option("How many.", 7)]}
    texts = {"name": Annotated[str | None, option("Of whom.", "nobody", "--name", "-n")]}

    @takes(one=numbers, two=texts, values=RUN, options=METHOD, network=NETWORK)
    def run(
        first: Annotated[str, typer.Option()] = "a",
        *,
        one: dict,
        last: bool = False,
        two: dict,
        values,
        options,
        network,
    ) -> None:
        """Do nothing."""
        received.append((first, one, last, two, values, options, network))

    app = typer.Typer()
    app.command()(run)
    return app, received


@pytest.mark.parametrize(
    ("arguments", "received"),
    [
        ([], ("a", {}, False, {}, {}, {}, {})),
        (["--count=3", "-n", "x", "--first", "b", "--last"], ("b", {"count": 3}, True, {"name": "x"}, {}, {}, {})),
        (
            ["--no-dense", "--width=32", "--rate", "0.5", "--sparsity=0.9", "--sparsity=1"],
            ("a", {}, False, {}, {"width": 32, "rate": 0.5, "dense": False, "sparsity": ["0.9", "1"]}, {}, {}),
        ),
        (
            ["--subset-factor", "2", "--no-regrow", "--scope=global"],
            ("a", {}, False, {}, {}, {"subset_factor": 2.0, "regrow": False, "scope": "global"}, {}),
        ),
        (["--depth=2", "--free-head"], ("a", {}, False, {}, {}, {}, {"depth": 2, "free_head": True})),
    ],
)
def test_each_group_receives_its_own_that_were_given(command, arguments, received):
    assert CliRunner().invoke(command[0], arguments).exit_code == 0
    assert command[1] == [received]


def test_the_help_says_whose_an_option_is_and_its_default(command):
    text = CliRunner().invoke(command[0], ["--help"], env={"COLUMNS": "900"}).output
    places = [text.index(f"--{name} ") for name in ("first", "count", "last", "name")]
    assert places == sorted(places) and "(7)" in text and "(nobody)" in text
    lines = {word: line for line in text.splitlines() for word in line.split() if word.startswith("--")}
    assert {f"--{name.replace('_', '-')}" for name in OPTIONS} <= lines.keys()
    assert "[vrpge]" in lines["--masks"] and "(2)" in lines["--masks"]
    assert (
        "(layer; vrpge: global; granet: global)" in lines["--scope"]
        and "(2.0)" in lines["--pool"]
        and "(0.75)" in lines["--stop"]
    )
    assert "(0.1)" in lines["--agent-gamma"] and "(losses)" in lines["--agent-estimate"]
    assert "default" not in lines["--score-tokens"] and '"uniform", "grabo" or "graest"' in lines["--distribution"]
    assert "(the recipe's; mlp: 64)" in lines["--batch-size"] and "none, crop, crop-flip" in lines["--augment"]
    assert "gpt: 6; gpt-nano: 3" in lines["--depth"] and "gelu, swiglu" in lines["--activation"]


def test_a_word_where_a_number_must_be(command):
    result = CliRunner().invoke(command[0], ["--masks", "many"])
    assert result.exit_code == 2 and "masks" in result.output


@pytest.mark.parametrize(("text", "value"), [("0.9", 0.9), ("mlp=0.9, attention=.7", {"mlp": 0.9, "attention": 0.7})])
def test_a_sparsity_is_a_number_or_one_for_each_kind(text, value):
    assert sparsity_of(text) == value


@pytest.mark.parametrize("text", ["much", "mlp=", "0.9,0.8", "0.9,mlp=0.8", "mlp=0.9,mlp=0.8", ""])
def test_a_sparsity_that_is_neither(text):
    with pytest.raises(InputError, match=rf"^sparsity is '{text}'; .* such as mlp=0\.9,attention=0\.7$"):
        sparsity_of(text)
