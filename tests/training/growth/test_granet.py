"""GraNet on a hand-worked 4x4 grid: blocks go, and others are exchanged."""

from __future__ import annotations

import pytest
import torch

import sparsekern as sk
from tests.training.grids import free, grid_layer, over, places, step
from tests.training.test_base import batch, built, check_resumed, make, train


@pytest.mark.parametrize("regrow", [False, True])
@pytest.mark.parametrize("block", [1, 2])
def test_two_updates_by_hand(block, regrow):
    layer = grid_layer(block)
    options = {"drop_fraction": lambda step: 0.5, "stop": 3, "regrow": regrow, "allow_dense_scores": True}
    method = over(layer, sk.GraNet, final_sparsity=0.875, **options)
    # 2 + 4 / 8 rounded up: norms 1, 2 and 3 go. Of 9, 8 and 4 one is exchanged: 4, whose own place scores 4, for 14.
    assert step(layer, method) and free(layer) == [1, 2, 4]
    assert places(layer, [5]) == [(3, 1)] and not layer.values[5].any()
    # One more goes: the new one, which is zero still. Of 9 and 8 one is exchanged: 8, whose place scores 3, for 16.
    assert step(layer, method) and free(layer) == [1, 2, 4, 5]
    assert places(layer, [3, 0]) == [(3, 0), (0, 0)]
    assert not step(layer, method) and method.metrics()["sparsity/"] == 0.875


def test_what_is_freed_does_not_return_in_the_same_update():
    """With all places taken there is none that was empty before."""
    layer = sk.SparseLinear(8, 8, block_size=2, sparsity=0, seed=0)
    method = over(layer, sk.GraNet, final_sparsity=0.5, stop=3)
    before = layer.topology.keys().clone()
    assert step(layer, method)
    used = layer.topology.used()
    assert used.sum() == 9 and torch.equal(layer.topology.keys()[used], before[used])
    assert step(layer, method) and layer.topology.blocks() == 8


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("scoring", ["exact", "screen"])
@pytest.mark.parametrize("at", [5, 7])
def test_saved_loaded_and_continued_bit_for_bit(scoring, compact, at):
    """Updates after steps 4, 8 and 12: after 7 a probe is armed."""
    options = {"update_every": 4, "stop": 13, "scoring": scoring, "compact": compact, "min_age": 1}
    model, _, _ = check_resumed(lambda seed: built(sk.GraNet, seed, final_sparsity=0.75, **options), at, 14)
    assert sum(layer.topology.blocks() for layer in sk.sparse_layers(model).values()) == 7


def test_the_number_of_blocks_is_that_of_gradual_pruning():
    """Which blocks stay differs: new ones are weak, and go first."""
    counts = []
    for kind in (sk.GraNet, sk.Gradual):
        parts = built(kind, final_sparsity=0.75, scope="layer", update_every=2, stop=9)
        counts.append([])
        for at in range(10):
            train(*parts, [at])
            counts[-1].append([layer.topology.blocks() for layer in sk.sparse_layers(parts[0]).values()])
    assert counts[0] == counts[1] and counts[0][-1] == [2, 4, 1]


def test_tied_taps_are_refused():
    conv = sk.SparseConv2d(8, 8, 3, block_size=4, sparsity=0.5, tie_taps=True, seed=0)
    with pytest.raises(NotImplementedError, match="GraNet moves every block by itself"):
        sk.GraNet(conv, torch.optim.SGD(conv.parameters(), lr=0.1), stop=400)
    model = make()
    with pytest.raises(ValueError, match="sketches is 0"):
        sk.GraNet(model, torch.optim.SGD(model.parameters()), stop=400, sketches=0)
    assert model(batch(0)).shape == (6, 4)
