from __future__ import annotations

from pathlib import Path

from sparsekern.cli.run_options import absolute, given, of_recipe


def test_a_path_means_the_same_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute("a/../x.npz") == str(tmp_path / "x.npz") and absolute(None) is None
    assert absolute("~/x") == str(Path.home() / "x")


def test_false_is_given_and_none_is_not():
    assert given(dense=False, width=None, seeds=2) == {"dense": False, "seeds": 2}


def test_the_default_of_what_the_recipe_decides():
    assert of_recipe("batch_size") == "the recipe's; mlp: 64"
