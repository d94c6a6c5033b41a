import json
from datetime import datetime
from pathlib import Path

import pytest
import torch

from sparsekern.lab import checkpoint
from sparsekern.lab.config import Config
from sparsekern.lab.lock import locked
from sparsekern.lab.store import (
    Clock,
    Keeping,
    Metrics,
    best_step,
    create,
    default_folder,
    read_config,
    read_json,
    read_keeping,
    read_record,
    write_json,
)
from tests.saved import leftover

DATA = {"name": "x", "train_images": 9, "test_images": 3}
RESOLVED = Config(device="cpu").resolved(9, 1).to_json()


def damaged(**entries):
    """A config.json that is valid but for the given entries."""
    return json.dumps({"format_version": 3, "config": RESOLVED, "data": DATA} | entries)


def test_the_default_name_says_what_and_when():
    now = datetime(2026, 11, 20, 9, 5, 1)
    assert default_folder(Config(sparsity=0.95), now) == Path("runs/20261120-090501-set-0.95")
    assert default_folder(Config(recipe="wrn-28-4"), now) == Path("runs/20261120-090501-wrn-28-4-set-0.9")


def test_config_and_back(tmp_path):
    config = Config(epochs=3).resolved(9, 1)
    create(tmp_path / "a" / "b", config, DATA, {"torch": "1"})
    assert read_config(tmp_path / "a" / "b") == (config, DATA)
    assert json.loads((tmp_path / "a" / "b" / "config.json").read_text())["format_version"] == 3


def test_a_run_of_the_first_format_is_read(tmp_path):
    options = {"data": None, "sparsity": 0.8, "block_size": 8, "method": "set", "width": 64, "epochs": 4}
    options |= {"batch_size": 64, "rate": 1e-3, "update_every": 8, "seeds": 1, "device": "cpu", "dense": True}
    content = {"format_version": 1, "config": options, "data": DATA, "environment": {}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    config, data = read_config(tmp_path)
    assert (config.width, config.recipe, data) == (64, "mlp", DATA) and read_keeping(tmp_path) == Keeping()


def test_a_comparison_is_no_run(tmp_path):
    write_json(tmp_path / "plan.json", {"plan": {}})
    with pytest.raises(
        ValueError, match="is a comparison; give one of the runs in it. All of them go on by: sparsekern"
    ):
        read_config(tmp_path)
    create(tmp_path / "set-s0.9", Config(), {}, {})
    with pytest.raises(ValueError, match=r"such as .*set-s0.9. All of them go on by: sparsekern compare --out "):
        read_config(tmp_path)


def test_nothing_is_overwritten(tmp_path):
    create(tmp_path, Config(), {}, {})
    with pytest.raises(ValueError, match=r"not empty; resume it with --resume, or choose another --out"):
        create(tmp_path, Config(), {}, {})


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="cannot be made .*choose another --out"):
            create(path, Config(), {}, {})


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(ValueError, match=r"has no config.json; give the folder of a run"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "missing or damaged"),
        pytest.param("[" * 10**5, "missing or damaged", id="deep"),
        ("[]", "missing or damaged"),
        ("{}", "missing or damaged"),
        ('{"format_version": 99}', "has format version 99; this code reads 1 to 3"),
        ('{"format_version": 0}', "has format version 0"),
        ('{"format_version": "3"}', "has format version 3"),
        ('{"format_version": 3}', "is damaged: config: field required; start a new run"),
        ('{"format_version": 3, "config": [], "data": {}}', "is damaged: config: input should be a valid dictionary"),
        (damaged(config={"width": 0}), "other entries.*or start a new run"),
        (damaged(data="digits"), "is damaged: data: input should be a valid dictionary"),
        (damaged(data=DATA | {"train_images": "9"}), "is damaged: data.train_images: input should be a valid integer"),
        (damaged(config=RESOLVED | {"epochs": None}), "cannot be used: epochs must not be null"),
        (damaged(config=RESOLVED | {"augment": None, "device": None}), "augment and device must not be null"),
        (damaged(config=RESOLVED | {"width": 10**30}), "width is 10+; it must be a whole number of 1 to 2147483647"),
    ],
)
def test_a_damaged_configuration_is_described(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path)


def test_json_is_written_whole(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == {"format_version": 3, "a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_metrics_begin_with_the_rows_of_the_checkpoints(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"epoch": 1}\n{"epoch": 2}\n{"epo')
    metrics = Metrics(path, [{"epoch": 1}])
    metrics.append({"epoch": 2})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"epoch": 1}, {"epoch": 2}]


def test_a_run_killed_at_its_first_file_can_begin_again(tmp_path):
    (half := leftover(tmp_path)).mkdir()
    (half / "content.json").write_text('{"form')
    create(tmp_path, Config(), {}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_folder_of_something_else_is_not_said_to_be_resumable(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"which is not empty; choose another --out$"):
        create(tmp_path, Config(), {}, {})


def test_what_a_run_keeps(tmp_path):
    create(tmp_path, Config(), {}, {}, Keeping("500", 4))
    assert read_keeping(tmp_path) == Keeping("500", 4)
    content = json.loads((tmp_path / "config.json").read_text())
    for keeping, message in (
        ([], "not the configuration of a run"),
        ({"best": 1}, "does not know: .'best'"),
        ({"keep": 0}, "keep is 0"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(content | {"keeping": keeping}))
        with pytest.raises(ValueError, match=message):
            read_keeping(tmp_path)
    del content["keeping"]  # an older run does not say
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert read_keeping(tmp_path) == Keeping()


def test_a_lock_is_no_content(tmp_path):
    with locked(tmp_path):
        create(tmp_path, Config(), {}, {})


@pytest.mark.parametrize("every", ["0", "", "10", "05", "1.5min", "min", "3 h", "1d", "9" * 12, "5\n", None, 5])
def test_how_often(every):
    if every == "10":
        assert Keeping(every).save_every == every
        return
    with pytest.raises(ValueError, match=r"save_every is .* a number of steps such as 500, or a time"):
        Keeping(every)


@pytest.mark.parametrize("keep", [0, -1, 1.0, True, "2", None])
def test_how_many(keep):
    with pytest.raises(ValueError, match=r"keep is .*; it must be a whole number of 1 or more"):
        Keeping(keep=keep)


def test_there_and_back():
    assert Keeping.from_json(Keeping("2h", 5).to_json()) == Keeping("2h", 5)
    assert Keeping.from_json({"keep": 5}) == Keeping(keep=5)
    with pytest.raises(ValueError, match=r"does not know: \['last', 'other'\]"):
        Keeping.from_json({"other": 1, "last": 2})


def test_a_clock_of_steps():
    clock = Clock(Keeping("3"), steps=10)
    assert [clock.due(steps) for steps in (10, 12, 13)] == [False, False, True]
    clock.set(13)
    assert not clock.due(15) and clock.due(16)


@pytest.mark.parametrize(("every", "seconds"), [("2s", 2), ("10min", 600), ("2h", 7200)])
def test_a_clock_of_time(every, seconds, monkeypatch):
    now = [5.0]
    monkeypatch.setattr("sparsekern.lab.store.time.monotonic", lambda: now[0])
    clock = Clock(Keeping(every), steps=0)
    now[0] += seconds - 1
    assert not clock.due(10**9)
    now[0] += 1
    assert clock.due(0)
    clock.set(0)
    assert not clock.due(0)


def scored(network, epoch, accuracy):
    return {"network": network, "epoch": epoch, "step": 10 * epoch, "test_accuracy": accuracy}


def test_the_best_epoch_is_the_first_networks():
    rows = [scored("sparse", 1, 0.5), scored("dense", 1, 0.9), scored("sparse", 2, 0.7), scored("dense", 2, 0.6)]
    rows += [scored("sparse", 3, 0.7), scored("dense", 3, 1.0)]
    assert best_step(rows, ["sparse", "dense"]) == 40, "of equal ones the first"
    assert best_step([*rows, scored("sparse", 4, 0.9)], ["sparse", "dense"]) == 40, "the dense one is not done with it"
    assert best_step(rows[:1], ["sparse"]) == 10
    assert best_step(rows[:1], ["sparse", "dense"]) is None and best_step([], ["sparse"]) is None


CONFIG = Config(width=32, block_size=8, epochs=2, seeds=2, device="cpu").resolved(100, 1)

DATA = {"name": "digits", "train_images": 100, "test_images": 10}
FILM = {"every": 1, "layers": {}, "start": {}, "frames": [{"step": 0, "update": 0, "images": {}, "blocks": {}}]}
TIMES = {"median": None, "low": None, "high": None, "highest": None}


def row(network="sparse", seed=0, epoch=1):
    return {"network": network, "seed": seed, "epoch": epoch, "test_accuracy": 0.5, "loss": 1.0, "ms_per_step": None}


@pytest.fixture
def folder(tmp_path):
    create(tmp_path, CONFIG, DATA, {"device": "a CPU"})
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row()) + "\n" + json.dumps(row("dense")) + "\n")
    return tmp_path


def save(folder, **state):
    model = torch.nn.Linear(1, 1)
    return checkpoint.save(
        checkpoint.seed_folder(folder, 0), 1, {"sparse": model}, {"rows": [], "finished": False} | state
    )


def test_a_run_that_is_not_finished(folder):
    newest = save(folder, history=FILM)
    record = read_record(folder)
    assert (record.config, record.data, record.environment) == (CONFIG, DATA, {"device": "a CPU"})
    assert record.rows == [row(), row("dense")] and record.results is None
    assert record.checkpoint == newest and record.history == FILM
    assert record.missing == [f"The run is not finished: sparsekern train --resume {folder} goes on with it."]


def test_a_finished_run(folder):
    save(folder, history=FILM)
    environment = {"device": "another", "threads": 1, "kernels": "eager"}
    accuracy = {"mean": 0.5, "standard_deviation": None, "by_seed": [0.5]}
    sizes = {"stored_parameters": 1, "training_bytes": 4, "sparsity": 0.5}
    networks = {"sparse": {"test_accuracy": accuracy, "ms_per_step": TIMES, **sizes}}
    others = {"config": CONFIG.to_json(), "data": DATA, "networks": networks}
    write_json(folder / "results.json", {"environment": environment, **others})
    record = read_record(folder)
    assert record.results["environment"] == record.environment == environment
    assert record.missing == []


def test_what_is_missing_is_said(folder):
    assert any("no checkpoint yet" in text for text in read_record(folder).missing)
    save(folder)
    assert any("kept no block maps" in text for text in read_record(folder).missing)
    (checkpoint.latest(checkpoint.seed_folder(folder, 0)) / "state.pt").write_bytes(b"junk")
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
    with pytest.raises(ValueError, match=f"line 1 is damaged{what}; remove the line, or resume the run"):
        read_record(folder)


def test_a_record_of_a_folder_without_a_run(tmp_path):
    with pytest.raises(ValueError, match="run is .*, which has no config.json; give the folder of a run"):
        read_record(tmp_path)


def test_the_epochs_that_both_networks_have_done(folder):
    rows = [row(), row("dense"), row(epoch=2), row(seed=1), row("dense", seed=1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert read_record(folder).compared == [rows[i] for i in (0, 1, 3, 4)]
