"""Lottery tickets of the command: rounds in rows and results, and runs that are stopped or killed in any of them."""

from __future__ import annotations

import pytest
import torch

import sparsekern as sk
from sparsekern.errors import InputError
from sparsekern.lab import Config, Interrupted, Observer, checkpoint, resume, start
from sparsekern.lab.cost import training_cost
from sparsekern.lab.data import load
from sparsekern.lab.store import read_record
from tests.lab.runs import StopAt, changed, learner_of, rows_of, run_of

CONFIG = Config(
    width=32,
    block_size=8,
    sparsity=0.75,
    augment="none",
    epochs=2,
    batch_size=500,
    seeds=1,
    options={"rewind": 0.7, "rewind_rounds": 3},
    device="cpu",
)
BATCHES, STEPS, REWIND = 3, 6, 4
"""Step 4 is in the second epoch: the later rounds take two steps of one epoch."""


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch):
    monkeypatch.setattr("sparsekern.lab.run.draw_summary", lambda *_: None)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rounds") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparsekern.lab.run.draw_summary", lambda *_: None)
        return folder, start(CONFIG, folder, Observer()).results


def weights(folder):
    newest = checkpoint.latest(folder / "checkpoints" / "seed-0")
    return newest.name, *(newest.joinpath(f"{name}.safetensors").read_bytes() for name in CONFIG.networks)


def test_rows_and_results_have_all_rounds(straight):
    folder, results = straight
    rows = rows_of(folder)
    sparse = [row for row in rows if row["network"] == "sparse"]
    assert [(row["round"], row["epoch"], row["step"]) for row in sparse] == [
        (1, 1, 3),
        (1, 2, 6),
        (2, 3, 8),
        (3, 4, 10),
    ]
    assert [row["sparsity/global"] for row in sparse] == [0, 0, 0.5, 0.75]
    assert [row["epoch"] for row in rows if row["network"] == "dense"] == [1, 2]
    assert CONFIG.method == "static" and CONFIG.epochs_of("sparse") == 4 and CONFIG.epochs_of("dense") == 2
    network = results["networks"]["sparse"]
    timed = rows_of(folder, timed=True)
    assert network["seconds"]["mean"] == pytest.approx(sum(r["seconds"] for r in timed if r["network"] == "sparse"))
    assert network["test_accuracy"]["by_seed"] == [sparse[-1]["test_accuracy"]] and network["sparsity"] == 0.75
    assert weights(folder)[0] == f"step-{10 + STEPS:08d}"
    assert read_record(folder).rows == timed


def test_a_round_begins_as_the_first_one_was_after_the_step(straight):
    data = load()
    first = learner_of("sparse", changed(CONFIG, seeds=1), data)
    for _ in range(REWIND):
        if first.batch == BATCHES:
            first.finish_epoch()
        first.step()
    early, state = first.model.state_dict(), first.optimizer.state_dict()["state"]
    early = {name: tensor.clone() for name, tensor in early.items()}
    moments = {number: entries["exp_avg"].clone() for number, entries in state.items()}
    loss = first._loss_sum
    while first.round == 0:
        if first.batch == BATCHES:
            first.finish_epoch()
        else:
            first.step()
    assert (first.epoch, first.batch, first.steps, first._loss_sum) == (1, 1, REWIND, loss)
    assert torch.equal(first.model.get_parameter("input.weight"), early["input.weight"])
    layer = sk.sparse_layers(first.model)["hidden1"]
    slots = [
        int(((early["hidden1.row"] == row) & (early["hidden1.col"] == col)).nonzero())
        for row, col in zip(layer.row, layer.col, strict=True)
    ]
    assert len(slots) < 16 and torch.equal(layer.values, early["hidden1.values"][slots])
    names = [name for name, _ in first.model.named_parameters()]
    mine = first.optimizer.state[layer.values]["exp_avg"]
    assert torch.equal(mine, moments[names.index("hidden1.values")][slots])
    assert torch.equal(first.next_batch().batch[1], run_of(CONFIG, data).batch(first.run.order(0, 1), 1, 0, 1)[1])


# steps of both networks together: 3 + 3 + 3 + 3, then 2 + 2 of the sparse one alone
@pytest.mark.parametrize("stops", [(1,), (11,), (12,), (13,), (14,), (15,), (7, 4, 2, 1)])
def test_a_run_that_is_stopped_ends_bit_for_bit_alike(straight, tmp_path, stops):
    folder, results = straight
    with pytest.raises(Interrupted):
        start(CONFIG, tmp_path, StopAt(stops[0]))
    for stop in stops[1:]:
        with pytest.raises(Interrupted):
            resume(tmp_path, StopAt(stop))
    done = resume(tmp_path, Observer()).results
    assert rows_of(tmp_path) == rows_of(folder) and weights(tmp_path) == weights(folder)
    assert done["networks"]["sparse"]["test_accuracy"] == results["networks"]["sparse"]["test_accuracy"]


class Killed(StopAt):
    def should_stop(self):
        if super().should_stop():
            raise RuntimeError("killed")
        return False


def test_a_killed_run_goes_on_in_its_round(straight, tmp_path):
    with pytest.raises(RuntimeError, match="killed"):
        start(CONFIG, tmp_path, Killed(15))
    resume(tmp_path, Observer())
    assert rows_of(tmp_path) == rows_of(straight[0]) and weights(tmp_path) == weights(straight[0])


def test_it_stores_only_what_is_left(straight):
    learner = learner_of("sparse", CONFIG, load())
    sizes = []
    while learner.all_epochs < CONFIG.epochs_of("sparse"):
        learner.step()
        if learner.batch == BATCHES:
            sizes.append(
                (sum(layer.values.shape[0] for layer in learner.method.layers.values()), learner.training_bytes())
            )
            learner.finish_epoch()
    assert [slots for slots, _ in sizes] == [32, 32, 16, 8] and sizes[1][1] > sizes[2][1] > sizes[3][1]


def test_the_flops_of_all_rounds():
    data = load()
    cost = training_cost(run_of(CONFIG, data), "sparse")["training_flops"]
    dense = training_cost(run_of(CONFIG, data), "dense")["training_flops"] / 2 / 1438
    hidden = 6 * 2 * 32 * 32
    by_hand = dense * 6 + (dense - hidden / 2) * 2 + (dense - 3 * hidden / 4) * 2
    assert cost == pytest.approx(by_hand / 6 * 2 * 1438, rel=1e-3)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"options": {"rewind": 1.0}}, "rewind is 1, which leaves nothing to train"),
        ({"options": {"rewind": 0.1, "agent": True}}, "with which agent does not go"),
        ({"options": {"rewind": 0.1, "transform": "wide"}}, "with which transform does not go"),
        ({"options": {"rewind": 0.1, "stop": 0.5}}, "stop is 0.5, but with rewind blocks go between rounds only"),
        ({"options": {"rewind": 0.1, "rewind_from": 0.9}}, "all layers are sparser already"),
        ({"options": {"rewind": 0.1, "score": "snip"}}, "begins with all blocks"),
    ],
)
def test_what_does_not_go_with_it(values, text):
    with pytest.raises(InputError, match=text):
        learner_of("sparse", changed(CONFIG, **values), load())


def test_rounds_that_begin_at_the_start_or_at_a_sparsity():
    assert Config(options={"rewind": 0.0}).rounds == 3 and Config().rounds == 1
    learner = learner_of(
        "sparse", changed(CONFIG, options={"rewind": 0, "rewind_from": 0.5, "rewind_rounds": 2}), load()
    )
    blocks = []
    while learner.all_epochs < 4:
        learner.step()
        if learner.batch == BATCHES:
            row = learner.finish_epoch()
            blocks.append((row["round"], row["sparsity/global"]))
    assert blocks == [(1, 0.5), (1, 0.5), (2, 0.75), (2, 0.75)]
