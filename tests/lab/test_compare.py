"""A comparison of small networks: whole, killed and resumed, extended, refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparsekern.errors import InputError
from sparsekern.lab import Interrupted, Observer, resume
from sparsekern.lab.compare import Plan, compare, contestant, plan_for, read_plan, slug
from sparsekern.lab.config import Config
from sparsekern.lab.store import locked
from sparsekern.lab.train import Learner
from tests.saved import leftover

VALUES = {"width": 32, "epochs": 2, "batch_size": 400, "seeds": 2, "update_every": 2, "device": "cpu"}
CELLS = ["dense", "static-s0.5-b8", "gse-scope-global-s0.5-b8"]
NOWHERE = Path("a folder that does not exist")
TWO = (Config(method="static"), Config(method="gse", options={"scope": "global"}))


class Told(Observer):
    """Remembers the cells, and may stop or fail before a step."""

    def __init__(self, stop=None, kill=None):
        self.cells, self.steps, self.stop, self.kill = [], 0, stop, kill

    def cell(self, name, config, number, total):
        self.cells.append((name, number, total))

    def should_stop(self):
        self.steps += 1
        if self.steps == self.kill:
            raise KeyboardInterrupt
        return self.steps == self.stop


@pytest.fixture(autouse=True)
def _cheap(monkeypatch):
    for module in ("run", "compare"):
        monkeypatch.setattr(f"sparsekern.lab.{module}.draw_{'summary' if module == 'run' else 'comparison'}", _draw)
    monkeypatch.setattr("sparsekern.lab.compare.training_cost", lambda *_: {"training_flops": 8, "peak_bytes": 9})


def _draw(path, *_):
    path.write_text("a picture")


def plan(folder, **changes):
    given = {"contestants": TWO, "sparsities": (0.5,), "block_sizes": (8,)}
    return plan_for(folder, **{"values": VALUES, **given, **changes})


def without_times(content):
    times = ("seconds", "ms_per_step")
    return [{key: value for key, value in row.items() if key not in times} for row in content["rows"]]


def test_the_twin_takes_no_options():
    base = Config(options={"agent": True})
    assert Plan(base, TWO, (0.5,), (8,)).cells()["dense"].options == {}


def test_the_default_sparsity_is_the_recipe_s():
    assert plan_for(NOWHERE, {}).sparsities == (0.9,)
    assert plan_for(NOWHERE, {"recipe": "gpt"}).sparsities == ({"mlp": 0.9, "attention": 0.7},)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparsekern.lab.run.draw_summary", _draw)
        patch.setattr("sparsekern.lab.compare.draw_comparison", _draw)
        patch.setattr("sparsekern.lab.compare.training_cost", lambda *_: {"training_flops": 8, "peak_bytes": 9})
        folder, told = tmp_path_factory.mktemp("compare") / "new", Told()
        return folder, compare(plan(folder), folder, told), told


def test_every_cell_is_a_run_and_the_twin_is_trained_once(straight):
    folder, content, told = straight
    assert told.cells == [(name, number, 3) for number, name in enumerate(CELLS)]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["comparison.json", "comparison.md", "comparison.png", "plan.json", *CELLS]
    )
    assert [row["name"] for row in content["rows"]] == CELLS
    assert [row["method"] for row in content["rows"]] == ["dense", "static", "gse, scope global"]
    assert all(len(row["test_accuracy"]["by_seed"]) == 2 and row["training_flops"] == 8 for row in content["rows"])
    assert json.loads((folder / "comparison.json").read_text()) == content
    assert len((folder / "comparison.md").read_text().splitlines()) == 2 + 3
    assert told.steps == 3 * 2 * 2 * 4, "cells, seeds, epochs, batches"
    run = resume(folder / CELLS[2], Told()).results
    assert list(run["networks"]) == ["sparse"] and run["config"]["options"] == {"scope": "global"}


def test_a_second_call_trains_nothing(straight):
    folder, content, _ = straight
    again = Told()
    assert compare(plan_for(folder, {}), folder, again)["rows"] == content["rows"]
    assert again.steps == 0


@pytest.mark.parametrize(("stop", "kill"), [(19, None), (None, 30), (None, 1), (48, None)])
def test_interrupted_or_killed_it_ends_alike(straight, tmp_path, stop, kill):
    folder = tmp_path / "new"
    with pytest.raises((Interrupted, KeyboardInterrupt)) as stopped:
        compare(plan(folder), folder, Told(stop, kill))
    assert stop is None or stopped.value.folder == folder
    told = Told()
    content = compare(plan_for(folder, {}), folder, told)
    assert without_times(content) == without_times(straight[1])
    assert told.steps < 48 or kill == 1


def test_killed_between_training_and_its_cost(straight, tmp_path, monkeypatch):
    folder = tmp_path / "new"

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sparsekern.lab.compare.training_cost", killed)
        with pytest.raises(KeyboardInterrupt):
            compare(plan(folder), folder, Told())
    told = Told()
    assert without_times(compare(plan_for(folder, {}), folder, told)) == without_times(straight[1])
    assert told.steps == 2 * 2 * 2 * 4  # the twin was trained


def test_cells_may_be_added_later(tmp_path):
    few = {**VALUES, "seeds": 1, "epochs": 1}
    compare(plan(tmp_path, values=few, contestants=TWO[:1], dense=False), tmp_path, Told())
    told = Told()
    later = plan_for(tmp_path, {"epochs": 1}, TWO, (0.75,), ())
    content = compare(later, tmp_path, told)
    assert [row["name"] for row in content["rows"]] == [
        "static-s0.5-b8",
        "gse-scope-global-s0.5-b8",
        "static-s0.75-b8",
        "gse-scope-global-s0.75-b8",
    ]
    assert told.steps == 3 * 4 and content["rows"][0]["gap_to_dense"] is None
    content = compare(plan_for(tmp_path, {}, dense=True), tmp_path, Told())
    assert content["rows"][0]["name"] == "dense" and content["rows"][1]["gap_to_dense"] is not None
    assert plan_for(tmp_path, {}, dense=False).dense, "what is there stays"


def test_the_defaults():
    found = plan_for(NOWHERE, {})
    assert [contestant.method for contestant in found.contestants] == [
        "static",
        "set",
        "rigl",
        "gse",
        "vrpge",
        "gradual",
        "granet",
        "mest",
        "srigl",
        "dsr",
        "top-kast",
    ]
    assert (found.sparsities, found.block_sizes, found.dense) == ((0.9,), (16,), True)
    twice = plan_for(NOWHERE, {}, (*TWO, *TWO), (0.5, 0.5), (8, 8))
    assert (twice.contestants, twice.sparsities, twice.block_sizes) == (TWO, (0.5,), (8,))


def test_the_plan_and_back(straight):
    found = read_plan(straight[0])
    assert found == plan(NOWHERE) and Plan.from_json(json.loads(json.dumps(found.to_json()))) == found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsities": (1.5,)}, "sparsity is 1.5"),
        ({"block_sizes": (64,)}, "block_size is 64, larger than the layers of width 32"),
        ({"sparsities": (0.99,)}, "static-s0.99-b8: .*every layer needs at least one"),
        ({"contestants": (Config(method="rigl"),), "block_sizes": (1,)}, "rigl-s0.5-b1: 'hidden1' has 1x1 blocks"),
        ({"values": {**VALUES, "data": "nothing.npz"}}, "nothing.npz.* does not exist"),
    ],
)
def test_an_error_is_found_before_anything_is_written(tmp_path, changes, message):
    folder = tmp_path / "new"
    with pytest.raises(ValueError, match=message):
        compare(plan(folder, **changes), folder, Told())
    assert not folder.exists()


def test_an_empty_plan():
    with pytest.raises(ValueError, match="sparsities is empty; give at least one"):
        Plan(Config(), TWO, (), (8,))


def test_other_values_than_the_folder_has(straight):
    with pytest.raises(ValueError, match=r"epochs is 3, but the comparison in .* has 2; drop the option, or choose"):
        plan_for(straight[0], {"epochs": 3})


def test_a_folder_with_something_else(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(ValueError, match="holds no comparison and is not empty; choose another --out"):
        plan_for(tmp_path, {})
    with pytest.raises(ValueError, match="x, which is a file; choose the name of a folder for --out"):
        plan_for(tmp_path / "x", {})
    (tmp_path / "x").unlink()
    leftover(tmp_path).mkdir()
    assert read_plan(tmp_path) is None  # what a kill may leave


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        compare(plan(tmp_path / "file" / "x"), tmp_path / "file" / "x", Told())


def test_a_folder_in_use(tmp_path):
    with locked(tmp_path), pytest.raises(ValueError, match="in use by another process"):
        compare(plan(tmp_path), tmp_path, Told())


def test_a_damaged_plan(tmp_path):
    (tmp_path / "plan.json").write_text('{"format_version": 4, "plan": {"base": 3}}')
    with pytest.raises(ValueError, match="plan.json is damaged: base: .*; choose another --out"):
        read_plan(tmp_path)


def test_a_run_of_other_options_in_the_folder(straight, tmp_path):
    (tmp_path / "static-s0.5-b8").mkdir()
    config = json.loads((straight[0] / "static-s0.5-b8" / "config.json").read_text())
    config["config"]["rate"] = 0.5
    (tmp_path / "static-s0.5-b8" / "config.json").write_text(json.dumps(config))
    (tmp_path / "plan.json").write_text((straight[0] / "plan.json").read_text())
    with pytest.raises(ValueError, match=r"static-s0.5-b8: the run in .* has other options"):
        compare(plan_for(tmp_path, {}), tmp_path, Told())


def test_a_run_that_fails_leaves_the_others(tmp_path, monkeypatch):
    step = Learner.step

    def diverged(learner):
        if learner.network == "sparse" and type(learner.method).__name__ == "Static":
            raise InputError("the loss is nan")
        return step(learner)

    monkeypatch.setattr(Learner, "step", diverged)
    with pytest.raises(ValueError, match=r"1 of 3 runs failed .*static-s0.5-b8: the loss is nan"):
        compare(plan(tmp_path, values={**VALUES, "epochs": 1, "seeds": 1}), tmp_path, Told())
    assert [row["name"] for row in json.loads((tmp_path / "comparison.json").read_text())["rows"]] == CELLS[::2]


@pytest.mark.parametrize(
    ("text", "preset", "entries", "name"),
    [
        ("static", False, ("static", None, {}), "static"),
        (
            "gse:subset_factor=2,distribution=grabo",
            False,
            ("gse", None, {"distribution": "grabo", "subset_factor": 2.0}),
            "gse-distribution-grabo-subset-factor-2.0",
        ),
        (
            "rigl: allow-dense-scores, regrow=no",
            False,
            ("rigl", None, {"regrow": False, "allow_dense_scores": True}),
            None,
        ),
        ("gse-imagenet:drop_fraction=0.1", True, ("gse", "gse-imagenet", {"drop_fraction": 0.1}), None),
    ],
)
def test_from_a_text(text, preset, entries, name):
    found = contestant(text, preset=preset)
    assert (found.method, found.preset, found.options) == entries
    assert name is None or slug(found) == name


def test_the_slug_names_the_preset():
    assert slug(contestant("gse-imagenet:drop_fraction=0.1", preset=True)) == "gse-imagenet-drop-fraction-0.1"


@pytest.mark.parametrize(
    ("text", "preset", "message"),
    [
        ("sett", False, "method is 'sett'; it must be one of static, set"),
        ("gsee", True, "preset is 'gsee'; it must be one of set-mocanu, set-rigl"),
        ("set:masks=3", False, "masks is 3, but method set has no such option; vrpge has it"),
        ("set:depth=3", False, "'depth' is no option of a method; set has start, stop"),
        ("vrpge:masks=some", False, "masks is 'some'; it must be a whole number"),
        ("vrpge:masks", False, "masks is 'true'; it must be a whole number"),
    ],
)
def test_what_is_wrong_is_named(text, preset, message):
    with pytest.raises(ValueError, match=message):
        contestant(text, preset=preset)
