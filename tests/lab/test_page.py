from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.analysis import summary
from sparsekern.lab import Config
from sparsekern.lab import page as module
from sparsekern.lab.history import History
from sparsekern.lab.page import command_of, page_of, results_so_far, values_of
from sparsekern.lab.store import Record

CONFIG = Config(width=32, block_size=8, epochs=2, seeds=2, device="cpu", sparsity=0.75).resolved(100, 1)


def row(network, seed, epoch):
    numbers = {"test_accuracy": 0.4 + 0.1 * epoch, "loss": 1 / epoch, "ms_per_step": 2.0 + (network == "dense")}
    numbers |= {"seconds": 1.0, "network": network, "seed": seed, "epoch": epoch}
    if network == "sparse":
        numbers |= {f"{key}/{name}": 0.5 for key in ("churn", "itop", "kept", "sparsity") for name in ("0", "2")}
        numbers |= {"itop/global": 0.5, "sparsity/global": 0.75}
    return numbers


ROWS = [row(network, seed, epoch) for seed in (0, 1) for epoch in (1, 2) for network in ("sparse", "dense")]
SIZES = {
    "sparse": {"network_sparsity": 0.7, "stored_parameters": 10, "training_bytes": 40},
    "dense": {"network_sparsity": 0.0, "stored_parameters": 40, "training_bytes": 80},
}


def trained(layer=None, block=8):
    model = nn.Sequential(layer or nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    sk.sparsify_(model, 0.75, block, targets="0")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = sk.SET(model, optimizer, update_every=1, drop_fraction=0.5)
    history = History(method)
    for _ in range(3):
        optimizer.step()
        method.step()
        history.step()
    return model, history.state_dict()


def record(**changes):
    data = {"name": "digits", "train_images": 100, "test_images": 10}
    whole = Record(Path("run"), CONFIG, data, {"device": "a CPU"}, ROWS, None, None, trained()[1], [])
    return replace(whole, **changes)


def test_the_page_of_a_run():
    model, history = trained()
    results = results_so_far(record(history=history), SIZES)
    page = page_of(record(), results, (["", "sparse"], [["x", "1"]]), ["a note"], summary(model), "measured here")
    assert (
        page.title == "digits: MLP of width 32, 75 % sparse in blocks of 8\u00a0x\u00a08 (set), beside its dense twin"
    )
    assert page.status == "Not finished: 2 seeds, 2 epochs each; seed 2 has done epoch 2."
    assert page.summary == (
        "The sparse network classifies 60.00 % of the test images rightly, its dense twin 60.00 %. It stores 4.00 "
        "times fewer numbers (70.0 % of all weights are absent), needs 2.00 times less memory to train, and a training "
        "step is 1.50 times faster."
    )
    assert len(page.charts) == 2 and len(page.moves) == 3 and "median" not in page.moves[0]
    (film,) = page.films
    assert (film.layer, film.width, film.height, len(film.frames)) == ("0", 4, 4, 4)
    caption, short, image = film.frames[-1]
    assert caption.startswith("after update 3, step 3, epoch 1.5: 4 blocks, ")
    assert short == "update 3, epoch 1.5 (so far)" and image.startswith("data:image/png;base64,")
    assert film.frames[0][:2] == (
        "before training, epoch 0.0: 4 blocks, 100 % of them where blocks were at the start",
        "start",
    )
    assert (
        film.about
        == "A cell is a block of 8 x 8 weights; down: output features, across: input features; 4 x 4 places for blocks."
    )
    sparse, dense = page.layers
    assert (sparse.kind, sparse.shape, sparse.blocks, sparse.sparsity) == (
        "SparseLinear",
        "32 x 32",
        "4 of 16 (8 x 8)",
        0.75,
    )
    assert (dense.blocks, dense.mebibytes) == ("dense", (2 * 4096 / 2**20, 2 * 4096 / 2**20))
    parts, whole = page.memory
    assert list(parts) == ["values", "gradient", "optimizer", "index"] and parts["values"] == 1024 / 2**20
    assert whole == 2 * 4096 / 2**20
    assert page.settings["Configuration"]["sparsity"] == 0.75 and "options" not in page.settings["Configuration"]


def test_the_page_of_a_finished_run():
    done = results_so_far(record(), SIZES)
    page = page_of(record(results=done), done, None, [], None, "")
    assert page.status == "Finished: 2 seeds, 2 epochs each."
    assert page.films[0].frames[-1][1] == "update 3, epoch 1.5 (the last one)"
    assert results_so_far(record(results=done), None) is done


def test_results_of_some_seeds_are_called_so():
    results = results_so_far(record(rows=ROWS[:4]), SIZES)
    assert results["config"]["seeds"] == 1 and results["networks"]["sparse"]["test_accuracy"]["by_seed"] == [
        pytest.approx(0.6)
    ]
    assert results_so_far(record(rows=ROWS[:1]), SIZES) is None, "the twin has not done the epoch"
    assert results_so_far(record(), None) is None


def test_a_run_that_has_done_nothing():
    page = page_of(record(rows=[], history=None), None, None, [], None, "")
    assert (page.charts, page.films, page.moves, page.layers, page.memory) == ([], [], [], [], None)
    assert page.status == "Not finished: no epoch of 2 epochs is done." and page.summary == "No epoch is finished yet."


def test_a_run_without_a_sparse_network():
    config = replace(CONFIG, sparse=False)
    rows = [r for r in ROWS if r["network"] == "dense"]
    alone = record(config=config, rows=rows, history=None)
    results = results_so_far(alone, {"dense": SIZES["dense"]})
    page = page_of(alone, results, None, [], None, "")
    assert page.title == "digits: MLP of width 32, dense"
    assert page.summary == "The dense network classifies 60.00 % of the test images rightly and stores 40 numbers."
    assert page.moves == [] and len(page.charts) == 2


def test_a_network_that_is_slower_and_larger():
    results = results_so_far(record(), {"sparse": SIZES["dense"], "dense": SIZES["sparse"]})
    results["comparison"]["time_sparse_over_dense"]["median"] = 2.0
    sentence = page_of(record(), results, None, [], None, "").summary
    assert (
        "4.00 times more numbers (0.0 % of all weights are absent), needs 2.00 times more memory to train, and a "
        "training step is 2.00 times slower."
    ) in sentence
    results["comparison"]["time_sparse_over_dense"]["median"] = None
    assert page_of(record(), results, None, [], None, "").summary.endswith("more memory to train.")


def test_what_a_cell_is():
    def about(layer, block, **changes):
        return page_of(record(history=trained(layer, block)[1], **changes), None, None, [], None, "").films[0].about

    conv = about(nn.Conv2d(8, 8, 3, groups=2), 4)
    assert "3 x 3 panels, one for each place of the kernel; in each panel, down: output channels" in conv
    assert "the 2 groups lie below each other" in conv and "2 x 9 places" in conv
    assert "A cell is a single weight;" in about(nn.Linear(16, 16), 1)
    assert "A cell is a tile of 2 x 2 places, each for a single weight;" in about(nn.Linear(200, 200), 1)
    candidates = replace(CONFIG, method="vrpge", update_every=1)
    assert "candidates" in about(nn.Linear(32, 32), 8, config=candidates)


def test_films_are_thinned_out_until_they_fit(monkeypatch):
    whole = page_of(record(), None, None, [], None, "").films[0].frames
    monkeypatch.setattr(module, "FILM_BYTES", 1)
    few = page_of(record(), None, None, [], None, "").films[0].frames
    assert few == [whole[0], whole[-1]]


@pytest.mark.parametrize(
    ("options", "command"),
    [
        ({}, "sparsekern train --recipe mlp"),
        ({"data": "/a b", "dense": False}, "sparsekern train --recipe mlp --data '/a b' --no-dense"),
        (
            {"method": "set", "options": {"drop_fraction": 0.5, "keep_connected": True}, "rate": 0.01},
            "sparsekern train --recipe mlp --rate 0.01 --drop-fraction 0.5 --keep-connected",
        ),
        ({"recipe": "resnet20", "epochs": 3}, "sparsekern train --recipe resnet20 --epochs 3"),
    ],
)
def test_the_command_that_trains_the_same(options, command):
    assert command_of(Config(**options)) == command


def test_plain_values():
    model, _ = trained()
    values = values_of(record(), None, summary(model))
    assert (values["finished"], values["rows"], values["missing"]) == (False, ROWS, [])
    assert values["layers"][0]["blocks"] == 4 and values["layers"][0]["milliseconds"] is None
    assert [frame["update"] for frame in values["topology"]] == [0, 1, 2, 3]
    assert values_of(record(history=None), None, None)["layers"] == []
