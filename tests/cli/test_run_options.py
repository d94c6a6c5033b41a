from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import typer
from typer.testing import CliRunner

from sparsekern.cli.run_options import RUN_OPTIONS, absolute, of_recipe, takes_run_options
from sparsekern.lab import Config


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
