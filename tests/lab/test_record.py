import json

import pytest
import torch

from sparsekern.lab import Config, checkpoint
from sparsekern.lab.folder import create, write_json
from sparsekern.lab.record import read_record

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


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(ValueError, match="run is .*, which has no config.json; give the folder of a run"):
        read_record(tmp_path)


def test_the_epochs_that_both_networks_have_done(folder):
    rows = [row(), row("dense"), row(epoch=2), row(seed=1), row("dense", seed=1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert read_record(folder).compared == [rows[i] for i in (0, 1, 3, 4)]
