"""Run folders that somebody has written to: each ends in results or in one sentence, and no memory is overwritten."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil

import pytest
import torch
from typer.testing import CliRunner

from sparsekern.cli.main import application
from sparsekern.errors import InputError
from sparsekern.lab import Config, Interrupted, Observer, checkpoint, resume, start
from sparsekern.lab.store import CONFIG, METRICS, RESULTS
from tests.lab.runs import StopAt, changed

SMALL = Config(
    width=16,
    block_size=8,
    sparsity=0.5,
    epochs=2,
    batch_size=400,
    seeds=1,
    update_every=1,
    augment="none",
    device="cpu",
)
MUTATIONS = int(os.environ.get("MUTATIONS", "8"))
"""Of each kind of file: entries and values drawn from all there are. More by hand: MUTATIONS=500."""

METHODS = ("set", "rigl", "gse", "vrpge", "agent")

PUT = (
    None,
    True,
    -1,
    0,
    2**40,
    10**30,
    0.5,
    float("nan"),
    "x",
    [],
    {},
    [[1]],
    {"x": 1},
    torch.zeros(1),
    torch.zeros(0),
)
"""What is put in the place of an entry."""


@pytest.fixture(autouse=True)
def _cheap(monkeypatch):
    monkeypatch.setattr("sparsekern.lab.run.draw_summary", lambda *_: None)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run of each method that was stopped in its second epoch, when it has a state of every kind."""
    folders = {}
    for method in METHODS:
        options = {"method": method} if method != "agent" else {"options": {"agent": True}}
        folders[method] = folder = tmp_path_factory.mktemp("stopped") / method
        config = changed(SMALL, **options)
        with pytest.raises(Interrupted):
            start(config, folder, StopAt(11))
    return folders


def entries(value, path=()):
    """Yield the path of every entry of nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, item in items:
        yield (*path, key)
        yield from entries(item, (*path, key))


def mutated(value, path, put):
    """Return a copy in which another value is at the path, or nothing at all."""
    new = copy.deepcopy(value)
    place = new
    for key in path[:-1]:
        inner = place[key]
        if isinstance(inner, tuple):
            place[key] = inner = list(inner)
        place = inner
    if put is KeyError:
        del place[path[-1]]
    else:
        place[path[-1]] = put(place[path[-1]]) if callable(put) else put
    return new


def shrunk(value):
    return value[:1].clone() if isinstance(value, torch.Tensor) and value.dim() else "shrunk"


def stretched(value):
    return value[:1].clone().expand(2**20, *value.shape[1:]) if isinstance(value, torch.Tensor) and value.dim() else 1.5


def integers(value):
    return value.long() if isinstance(value, torch.Tensor) and value.is_floating_point() else -7


def outcome(folder, observer=None):
    """Resume a run; return what it said, None for results. Any other error, or several lines, fails the test."""
    try:
        resume(folder, observer or Observer())
    except InputError as error:
        said = str(error)
        assert said and "\n" not in said
        return said
    return None


def replace_state(folder, state):
    for path in folder.glob("checkpoints/seed-0/step-*/state.pt"):
        torch.save(state, path)


@pytest.mark.parametrize("method", METHODS)
def test_every_entry_of_a_state_may_be_anything(stopped, tmp_path, method):
    drawn = random.Random(method)
    state = checkpoint.load_state(checkpoint.latest(checkpoint.seed_folder(stopped[method], 0)))
    puts = (*PUT, KeyError, shrunk, stretched, integers)
    cases = [(path, put) for path in entries(state) for put in puts]
    for number, (path, put) in enumerate(drawn.sample(cases, MUTATIONS)):
        folder = tmp_path / str(number)
        shutil.copytree(stopped[method], folder)
        replace_state(folder, mutated(state, path, put))
        try:
            outcome(folder)
        except Exception as error:
            raise AssertionError(f"{'.'.join(map(str, path))} <- {put!r}") from error
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparsekern.lab.run.draw_summary", lambda *_: None)
        start(SMALL, folder, Observer())
    return folder


def test_every_entry_of_the_state_of_a_finished_seed_may_be_anything(finished, tmp_path):
    drawn = random.Random(0)
    state = checkpoint.load_state(checkpoint.latest(checkpoint.seed_folder(finished, 0)))
    cases = [(path, put) for path in entries(state) for put in (*PUT, KeyError, shrunk, stretched, integers)]
    for number, (path, put) in enumerate(drawn.sample(cases, MUTATIONS)):
        folder = tmp_path / str(number)
        shutil.copytree(finished, folder)
        (folder / RESULTS).unlink()
        (folder / "checkpoints" / "seed-0" / "step-00000008").rename(folder / "aside")
        shutil.rmtree(folder / "checkpoints" / "seed-0")
        (folder / "checkpoints" / "seed-0").mkdir()
        (folder / "aside").rename(folder / "checkpoints" / "seed-0" / "step-00000008")
        replace_state(folder, mutated(state, path, put))
        try:
            outcome(folder)
            page(folder)
        except Exception as error:
            raise AssertionError(f"{'.'.join(map(str, path))} <- {put!r}") from error


def page(folder):
    """Make the page of a run, as `sparsekern report --no-measure` does; what is told in one sentence is fine."""
    result = CliRunner().invoke(application(), ["report", str(folder), "--no-measure"])
    if result.exit_code not in (0, 2):
        raise result.exception or RuntimeError(result.output)
    assert result.exit_code == 0 or result.stderr.count("\n") == 1, result.stderr


@pytest.mark.parametrize("name", [RESULTS, CONFIG, METRICS])
def test_every_entry_of_a_json_file_may_be_anything(finished, tmp_path, name):
    drawn = random.Random(name)
    text = (finished / name).read_text()
    content = [json.loads(line) for line in text.splitlines()] if name == METRICS else json.loads(text)
    plain = [put for put in PUT if not isinstance(put, torch.Tensor)]
    cases = [(path, put) for path in entries(content) for put in (*plain, KeyError)]
    for number, (path, put) in enumerate(drawn.sample(cases, MUTATIONS)):
        folder = tmp_path / str(number)
        shutil.copytree(finished, folder)
        new = mutated(content, path, put)
        (folder / name).write_text(
            "".join(json.dumps(row) + "\n" for row in new) if name == METRICS else json.dumps(new)
        )
        if "width" in path and put in (2**40, 10**30):
            continue  # memory for it would be asked for
        try:
            if name != CONFIG:  # another training would begin
                outcome(folder)
            page(folder)
        except Exception as error:
            raise AssertionError(f"{'.'.join(map(str, path))} <- {put!r}") from error


@pytest.mark.parametrize("change", [shrunk, stretched, integers, torch.Tensor.t, torch.Tensor.to_sparse])
@pytest.mark.parametrize("entry", ["exp_avg", "exp_avg_sq", "step"])
def test_the_optimizer_never_gets_a_state_of_another_shape(stopped, tmp_path, change, entry):
    """Fused AdamW writes as many elements as the parameter has, wherever they would lie."""
    shutil.copytree(stopped["set"], tmp_path / "run")
    state = checkpoint.load_state(checkpoint.latest(checkpoint.seed_folder(tmp_path / "run", 0)))
    kept = state["learners"]["sparse"]["optimizer"]["state"]
    number, tensor = next((n, e[entry]) for n, e in kept.items() if entry == "step" or e[entry].dim() == 2)
    if entry == "step" and change is torch.Tensor.t:
        change = torch.Tensor.int
    kept[number][entry] = change(tensor)
    replace_state(tmp_path / "run", state)
    said = outcome(tmp_path / "run")
    assert f"{entry} of parameter {number} must be" in said or "is damaged, or not a torch.save file" in said


@pytest.mark.parametrize(
    ("entry", "value", "words"),
    [
        ("network_sparsity", 1.5, "less than or equal to 1"),
        ("network_sparsity", "x", "valid number"),
        ("ms_per_step", {"median": 1.0, "low": 0.5, "high": None, "highest": 2.0}, "both numbers or both null"),
        ("ms_per_step", {"median": 1.0, "low": None, "high": None, "highest": None}, "both numbers or both null"),
        ("ms_per_step", {"median": None, "low": 0.5, "high": 0.6, "highest": None}, "quartiles without a median"),
    ],
)
def test_numbers_of_results_that_cannot_be(finished, tmp_path, entry, value, words):
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / RESULTS
    results = json.loads(path.read_text())
    results["networks"]["sparse"][entry] = value
    path.write_text(json.dumps(results))
    result = CliRunner().invoke(application(), ["report", str(tmp_path / "run"), "--no-measure"])
    assert result.exit_code == 2 and words in result.stderr and result.stderr.count("\n") == 1, result.stderr
