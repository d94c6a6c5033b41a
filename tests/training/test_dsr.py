"""DSR on two hand-worked 4x4 grids: one threshold for both, and growth in proportion to what is left."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.topology import Grid, from_mask
from tests.training.grids import changed, grid_layer, over
from tests.training.test_base import built, check_resumed, make


def two_layers() -> nn.Sequential:
    """Root mean squares 4.5, 0.5, 1, 4, 1.5, 2 and a free slot, in blocks of 2x2; 0.1, 0.2, 5, 6 and two free slots."""
    mask = torch.zeros(4, 4, dtype=torch.int64)
    mask[0] = 1
    second = sk.SparseLinear(4, 4, topology=from_mask(Grid(4, 4, (1, 1)), mask), capacity=6)
    with torch.no_grad():
        second.values[:4] = torch.tensor([0.1, 0.2, 5, 6]).view(4, 1, 1)
    return nn.Sequential(grid_layer(capacity=7), second)


def dsr(model, **options) -> sk.DSR:
    options = {"drop_fraction": lambda step: 0.3} | options
    return over(model, sk.DSR, **options)


def test_two_updates_by_hand():
    model = two_layers()
    method = dsr(model, threshold=1.2)
    before = [layer.topology.keys().clone() for layer in model]
    # 0.5, 1, 0.1 and 0.2 go. 4 and 2 blocks are left, so 4 * 4/6 and 4 * 2/6 grow: 2.67 and 1.33, rounded 3 and 1, for
    # which the first layer has slots. 4 is more than 1.1 * 3: the threshold is halved.
    assert method.update() and method.threshold == 0.6
    assert [layer.topology.blocks() for layer in model] == [7, 3]
    moved = [
        (layer.topology.keys() != keys).nonzero().flatten().tolist() for layer, keys in zip(model, before, strict=True)
    ]
    assert moved == [[1, 2, 6], [0, 1]] and model[1].row.tolist().count(-1) == 3
    for layer, keys in zip(model, before, strict=True):
        new = layer.topology.keys()[layer.topology.keys() != keys]
        assert not set(new[new < 16].tolist()) & set(keys.tolist())
    # The four new ones are 0 and go; the rest is above 0.6. Again 3 and 1 grow, where the first has no free slot left.
    assert changed(model[0], method.update) == [1, 2, 6] and method.threshold == 0.3
    assert [layer.topology.blocks() for layer in model] == [7, 3]


def test_the_threshold_doubles_until_enough_go_and_stays_within_the_tolerance():
    model = two_layers()
    method = dsr(model, threshold=0.11)
    assert method.update() and method.threshold == 0.22, "one of 3"
    method = dsr(two_layers(), threshold=0.6)
    assert method.update() and method.threshold == 0.6, "3 of 3: 0.5, 0.1 and 0.2"
    method = dsr(two_layers(), threshold=1.1, tolerance=0.34)
    assert method.update() and method.threshold == 1.1, "4 of 3"
    method = dsr(two_layers(), threshold=2.0**-100, drop_fraction=lambda step: 0.0)
    assert not method.update() and method.threshold == 2.0**-100 == method.metrics()["threshold"]


def test_the_strongest_block_of_each_layer_stays_and_full_layers_keep_theirs():
    method = dsr(model := two_layers(), threshold=1e30)
    assert method.update()
    assert model[0].values[0, 0, 0] == 4.5 and model[1].values[3, 0, 0] == 6
    assert sum(layer.topology.blocks() for layer in model) == 10
    assert [(layer.values == 0).flatten(1).all(1).sum() for layer in model] == [4, 4], (
        "3 of 6 and 2 of 4 go, which is 0.6 at most"
    )
    full = sk.SparseLinear(8, 8, sparsity=0.0, block_size=2, seed=0)
    assert not dsr(full, threshold=1e30).update(), "there is no empty place"
    method = dsr(full, threshold=2.0**100)
    assert not method.update() and method.threshold == 2.0**100


def test_saved_loaded_and_continued_bit_for_bit():
    _, _, method = check_resumed(lambda seed: built(sk.DSR, seed, update_every=2, threshold=0.05), 5, 9)
    assert method.threshold != 0.05, "which the metrics compare, too"


def test_what_is_refused(caplog):
    for options, text in (
        ({"threshold": 0.0}, "threshold is 0.0; it must be above 0"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"tolerance": 1.5}, r"tolerance is 1.5; it must be in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=text) as raised:
            dsr(make(), **options)
        assert raised.value.parameter == next(iter(options))
    conv = sk.SparseConv2d(8, 8, 3, block_size=4, sparsity=0.5, tie_taps=True, seed=0)
    with pytest.raises(NotImplementedError, match="tie_taps=True, but DSR moves every block by itself"):
        dsr(conv)
    with caplog.at_level(logging.WARNING):
        dsr(make())
    assert "DSR moves blocks between layers, but no layer has a free slot" in caplog.text
    method = dsr(make())
    for threshold in (float("inf"), 0.0, -1.0):
        with pytest.raises(ValueError, match="threshold"):
            method.load_state_dict(method.state_dict() | {"threshold": threshold})
    assert method.threshold > 0
