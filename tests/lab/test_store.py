"""Files of a run folder: written whole, read once, and refused in one sentence when they are damaged."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import pytest
import torch

from sparsekern.errors import InputError
from sparsekern.lab import checkpoint
from sparsekern.lab.checkpoint import Clock, Keeping
from sparsekern.lab.config import Config
from sparsekern.lab.formats import FORMAT_VERSION
from sparsekern.lab.store import (
    append_row,
    create,
    default_folder,
    locked,
    read_config,
    read_json,
    read_record,
    write_json,
    write_rows,
)
from tests.lab.runs import DATA
from tests.saved import leftover

CONFIG = Config(width=32, block_size=8, epochs=2, seeds=2, device="cpu").resolved(100)
CONTENT = {
    "format_version": FORMAT_VERSION,
    "config": CONFIG.to_json(),
    "data": DATA,
    "environment": {},
    "keeping": asdict(Keeping()),
}
FILM = {"every": 1, "layers": {}, "start": {}, "frames": [{"step": 0, "update": 0, "images": {}, "blocks": {}}]}
TIMES = {"median": None, "low": None, "high": None, "highest": None}


def damaged(**entries):
    """A config.json that is valid but for the given entries."""
    return json.dumps(CONTENT | entries)


def options(**entries):
    return damaged(config=CONTENT["config"] | entries)


def test_the_default_name_says_what_and_when():
    now = datetime(2026, 11, 20, 9, 5, 1)
    assert default_folder(Config(sparsity=0.95), now) == Path("runs/20261120-090501-set-0.95")
    assert default_folder(Config(recipe="wrn-28-4"), now) == Path("runs/20261120-090501-wrn-28-4-set-0.9")


def test_config_and_back(tmp_path):
    create(tmp_path / "a" / "b", CONFIG, DATA, {"torch": "1"}, Keeping("500", 4))
    file = read_config(tmp_path / "a" / "b")
    assert (file.config, file.data.model_dump(), file.environment) == (CONFIG, DATA, {"torch": "1"})
    assert file.keeping == Keeping("500", 4)
    assert json.loads((tmp_path / "a" / "b" / "config.json").read_text())["format_version"] == 4


def test_a_comparison_is_no_run(tmp_path):
    write_json(tmp_path / "plan.json", {"plan": {}})
    with pytest.raises(
        InputError, match="is a comparison; give one of the runs in it. All of them go on by: sparsekern"
    ):
        read_config(tmp_path)
    create(tmp_path / "set-s0.9", Config(), {}, {})
    with pytest.raises(InputError, match=r"such as .*set-s0.9. All of them go on by: sparsekern compare --out "):
        read_config(tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="cannot be made .*choose another --out"):
            create(path, Config(), {}, {})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "missing or damaged"),
        pytest.param("[" * 10**5, "missing or damaged", id="deep"),
        ("[]", "missing or damaged"),
        ("{}", "missing or damaged"),
        *(
            (json.dumps(CONTENT | {"format_version": version}), rf"has format version {shown}; this code reads 4: use")
            for version, shown in ((3, 3), (99, 99), (0, 0), ("4", "'4'"), (4.0, "4.0"), (True, True))
        ),
        (json.dumps({"format_version": 4}), "is damaged: config: field required; use the version"),
        (damaged(config=[]), "is damaged: config: input should be a valid dictionary"),
        (damaged(config={"width": 0}), "other entries.*or start a new run"),
        (damaged(data="digits"), "is damaged: data: input should be a valid dictionary"),
        (damaged(data=DATA | {"train_images": "9"}), "is damaged: data.train_images: input should be a valid integer"),
        (options(epochs=None), "config: epochs must not be null"),
        (options(augment=None, device=None), "augment and device must not be null"),
        (options(width=10**30), "width is 10+; it must be a whole number from 1 to 2147483647"),
        (damaged(keeping=[]), "keeping: it must have the entries save_every and keep"),
        (damaged(keeping={"keep": 2}), "keeping: it must have the entries save_every and keep"),
        (damaged(keeping={"save_every": "1", "keep": 0}), "keeping: keep is 0"),
    ],
)
def test_a_damaged_configuration_is_described(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=message) as error:
        read_config(tmp_path)
    assert "\n" not in str(error.value)


def test_json_is_written_whole(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == {"format_version": 4, "a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_metrics_begin_with_the_rows_of_the_checkpoints(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"epoch": 1}\n{"epoch": 2}\n{"epo')
    write_rows(path, [{"epoch": 1}])
    append_row(path, {"epoch": 2})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"epoch": 1}, {"epoch": 2}]


def test_a_run_killed_at_its_first_file_can_begin_again(tmp_path):
    (half := leftover(tmp_path)).mkdir()
    (half / "content.json").write_text('{"form')
    with locked(tmp_path):  # a lock is no content either
        create(tmp_path, Config(), {}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_folder_of_something_else_is_not_said_to_be_resumable(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"which is not empty; choose another --out$"):
        create(tmp_path, Config(), {}, {})


@pytest.mark.parametrize("every", ["0", "", "05", "1.5min", "min", "3 h", "1d", "9" * 12, "5\n", None, 5])
def test_how_often(every):
    with pytest.raises(InputError, match=r"save_every is .* a number of steps such as 500, or a time"):
        Keeping(every)


@pytest.mark.parametrize("keep", [0, -1, 1.0, True, "2", None])
def test_how_many(keep):
    with pytest.raises(InputError, match=r"keep is .*; it must be a whole number of 1 or more"):
        Keeping(keep=keep)


def test_a_clock_of_steps():
    clock = Clock(Keeping("3"), steps=10)
    assert [clock.due(steps) for steps in (10, 12, 13)] == [False, False, True]
    clock.set(13)
    assert not clock.due(15) and clock.due(16)


@pytest.mark.parametrize(("every", "seconds"), [("2s", 2), ("10min", 600), ("2h", 7200)])
def test_a_clock_of_time(every, seconds, monkeypatch):
    now = [5.0]
    monkeypatch.setattr("sparsekern.lab.checkpoint.time.monotonic", lambda: now[0])
    clock = Clock(Keeping(every), steps=0)
    now[0] += seconds - 1
    assert not clock.due(10**9)
    now[0] += 1
    assert clock.due(0)
    clock.set(0)
    assert not clock.due(0)


def row(network="sparse", seed=0, epoch=1):
    times = {"ms_per_step": None, "seconds": 1.0}
    return {"network": network, "seed": seed, "epoch": epoch, "step": 4, "test_accuracy": 0.5, "loss": 1.0} | times


@pytest.fixture
def folder(tmp_path):
    create(tmp_path, CONFIG, DATA, {"device": "a CPU"})
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row()) + "\n" + json.dumps(row("dense")) + "\n")
    return tmp_path


def save(folder):
    model, state = torch.nn.Linear(1, 1), {"rows": [], "finished": False, "history": FILM}
    return checkpoint.save(checkpoint.seed_folder(folder, 0), 1, {"sparse": model.state_dict()}, state)


def test_a_run_that_is_not_finished(folder):
    newest = save(folder)
    record = read_record(folder)
    assert (record.config, record.data, record.environment) == (CONFIG, DATA, {"device": "a CPU"})
    assert record.rows == [row(), row("dense")] and record.results is None
    assert record.checkpoint == newest and record.history == FILM
    assert record.missing == [f"The run is not finished: sparsekern train --resume {folder} goes on with it."]


def test_a_finished_run(folder):
    save(folder)
    environment = {"device": "another", "threads": 1, "kernels": "eager"}
    accuracy = {"mean": 0.5, "standard_deviation": None, "by_seed": [0.5]}
    sizes = {"network_sparsity": 0.5, "stored_parameters": 1, "training_bytes": 4, "sparsity": 0.5}
    spent = {"seconds": {"mean": 1.0, "by_seed": [1.0]}, "ms_per_step": TIMES}
    networks = {"sparse": {"test_accuracy": accuracy, **sizes, **spent}}
    others = {"config": CONFIG.to_json(), "data": DATA, "networks": networks}
    write_json(folder / "results.json", {"environment": environment, **others})
    record = read_record(folder)
    assert record.results["environment"] == record.environment == environment
    assert record.missing == []


def test_what_is_missing_is_said(folder):
    assert any("no checkpoint yet" in text for text in read_record(folder).missing)
    (save(folder) / "state.pt").write_bytes(b"junk")
    assert any(text.startswith("Block maps: ") and "state.pt" in text for text in read_record(folder).missing)
    (folder / "metrics.jsonl").unlink()
    record = read_record(folder)
    assert record.rows == [] and any("nothing to plot" in text for text in record.missing)


def test_a_line_that_was_cut_off_is_left_out(folder):
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text() + '{"network": "sp')
    record = read_record(folder)
    assert len(record.rows) == 2 and any("last line of metrics.jsonl" in text for text in record.missing)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("junk", ""),
        pytest.param("[" * 10**5, "", id="deep"),
        ("[1]", ": it: input should be a valid dictionary or instance of Row"),
        ('{"network": "sparse"}', ": seed: field required"),
        (json.dumps(row() | {"loss": "low"}), ": loss: input should be a valid number"),
        (json.dumps(row() | {"loss": float("nan")}), ": loss: input should be a finite number"),
        (json.dumps(row() | {"churn/hidden1": [0]}), ": churn/hidden1: input should be a valid number"),
        (json.dumps(row() | {"network": "third"}), ": network: input should be 'sparse' or 'dense'"),
    ],
)
def test_a_damaged_line_before_the_last_is_an_error(folder, line, what):
    path = folder / "metrics.jsonl"
    path.write_text(line + "\n" + path.read_text())
    with pytest.raises(InputError, match=f"line 1 is damaged{what}; remove the line, or resume the run"):
        read_record(folder)


def test_the_epochs_that_both_networks_have_done(folder):
    rows = [row(), row("dense"), row(epoch=2), row(seed=1), row("dense", seed=1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert read_record(folder).compared == [rows[i] for i in (0, 1, 3, 4)]
