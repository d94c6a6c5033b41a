from pathlib import Path

import pytest
import torch

from sparsekern.lab import picture
from sparsekern.lab.config import Config


def network(accuracy, parameters):
    return {"test_accuracy": {"mean": accuracy}, "stored_parameters": parameters}


@pytest.mark.parametrize("dense", [True, False])
def test_what_the_picture_says(monkeypatch, dense):
    drawn = {}
    monkeypatch.setattr(picture, "draw_training", lambda path, **what: drawn.update(what, path=path))
    names = ("sparse", "dense") if dense else ("sparse",)
    rows = [
        {"network": name, "seed": seed, "epoch": epoch, "test_accuracy": 0.1 * epoch + 0.01 * seed, "loss": 1 / epoch}
        for seed in (0, 1)
        for epoch in (1, 2)
        for name in names
    ]
    networks = {"sparse": network(0.9751, 12345), "dense": network(0.9812, 1234567)}
    results = {
        "config": Config(epochs=2, dense=dense).to_json(),
        "data": {"name": "digits"},
        "networks": {name: networks[name] for name in names},
    }
    block_map = {"layer": "hidden1", "rows": 2, "cols": 3, "kernel": (1, 3)}
    block_map |= {"start": torch.tensor([0, 5]), "end": torch.tensor([1, 5])}
    picture.draw_summary(Path("x.png"), results, rows, block_map)
    assert picture._title(Config(recipe="wrn-28-4").to_json(), "x", "90 % sparse").startswith("x: WRN-28-4, hidden")
    for part in ("digits", "90 % sparse", "blocks of 16 x 16; set)", "width 2048"):
        assert part in drawn["title"]
    assert ("dense twin" in drawn["title"]) == dense
    assert "after 2 epochs: sparse 97.5 %" in drawn["subtitle"] and "12,345" in drawn["subtitle"]
    assert ("dense 98.1 %" in drawn["subtitle"]) == dense
    assert [curve.label for curve in drawn["accuracy"]] == ["90 % sparse", "dense twin"][: len(names)]
    assert drawn["accuracy"][0].by_seed == [pytest.approx([10, 20]), pytest.approx([11, 21])]
    assert drawn["loss"][0].by_seed == [[1, 0.5], [1, 0.5]]
    assert (drawn["block_map"].start, drawn["block_map"].end) == ([0, 5], [1, 5])
    assert drawn["block_map"].kernel == (1, 3)
