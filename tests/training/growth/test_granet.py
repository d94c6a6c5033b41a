"""GraNet on a hand-worked 4x4 grid: blocks go, and others are exchanged."""

from __future__ import annotations

import copy

import pytest
import torch

import sparsekern as sk
from tests.training.test_base import batch, bits, equal, make, train
from tests.training.test_gradual import free, grid_layer

# norms of the blocks, by slot         scores of places: norms of the gradient's blocks, g_J * f_I
#     9:0  .   1:1  .                     4  3.5  2  1
#     .   2:2  .    .                     8  7    4  2
#     .    .   .   8:3                   12 10.5  6  3
#    3:4   .   .   4:5                   16 14    8  4
G, F = [1.0, 2, 3, 4], [4.0, 3.5, 2, 1]


def step(layer, method) -> bool:
    """A step in which nothing is learnt, with the gradient above."""
    block = layer.block_size[0]
    x, dy = torch.zeros(1, 4 * block), torch.zeros(1, 4 * block)
    x[0, ::block], dy[0, ::block] = torch.tensor(F), torch.tensor(G)
    layer(x).backward(dy)
    method.optimizer.step()
    method.optimizer.zero_grad()
    return method.step()


@pytest.mark.parametrize("regrow", [False, True])
@pytest.mark.parametrize("block", [1, 2])
def test_two_updates_by_hand(block, regrow):
    layer = grid_layer(block)
    method = sk.GraNet(
        layer,
        torch.optim.SGD(layer.parameters(), lr=0.0),
        final_sparsity=0.875,
        drop_fraction=lambda step: 0.5,
        update_every=1,
        stop=3,
        regrow=regrow,
        allow_dense_scores=True,
    )
    # 2 + 4 / 8 rounded up: norms 1, 2 and 3 go. Of 9, 8 and 4 one is exchanged: 4, whose own place scores 4, for 14.
    assert step(layer, method) and free(layer) == [1, 2, 4]
    assert (layer.row[5], layer.col[5]) == (3, 1) and not layer.values[5].any()
    # One more goes: the new one, which is zero still. Of 9 and 8 one is exchanged: 8, whose place scores 3, for 16.
    assert step(layer, method) and free(layer) == [1, 2, 4, 5]
    assert (layer.row[3], layer.col[3]) == (3, 0) and (layer.row[0], layer.col[0]) == (0, 0)
    assert not step(layer, method) and method.metrics()["sparsity/"] == 0.875


def test_what_is_freed_does_not_return_in_the_same_update():
    """With all places taken there is none that was empty before."""
    layer = sk.SparseLinear(8, 8, block_size=2, sparsity=0, seed=0)
    method = sk.GraNet(layer, torch.optim.SGD(layer.parameters(), lr=0.0), final_sparsity=0.5, update_every=1, stop=3)
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

    def build(seed):
        model = make(seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        options = {"update_every": 4, "stop": 13, "scoring": scoring, "compact": compact, "min_age": 1}
        return model, optimizer, sk.GraNet(model, optimizer, final_sparsity=0.75, **options)

    through, first, second = build(0), build(0), build(1)
    train(*through, range(14))
    assert sum(layer.topology.blocks() for layer in sk.sparse_layers(through[0]).values()) == 7
    train(*first, range(at))
    saved = copy.deepcopy([part.state_dict() for part in first])
    if compact:
        sk.compact_(*second[:2], like=saved[0])
    for part, state in zip(second, saved, strict=True):
        part.load_state_dict(state)
    train(*second, range(at, 14))
    assert equal(bits(second[0]), bits(through[0]))


def test_the_number_of_blocks_is_that_of_gradual_pruning():
    """Which blocks stay differs: new ones are weak, and go first."""
    counts = []
    for kind in (sk.GraNet, sk.Gradual):
        model = make()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        method = kind(model, optimizer, final_sparsity=0.75, scope="layer", update_every=2, stop=9)
        counts.append([])
        for at in range(10):
            train(model, optimizer, method, [at])
            counts[-1].append([layer.topology.blocks() for layer in sk.sparse_layers(model).values()])
    assert counts[0] == counts[1] and counts[0][-1] == [2, 4, 1]


def test_tied_taps_are_refused():
    conv = sk.SparseConv2d(8, 8, 3, block_size=4, sparsity=0.5, tie_taps=True, seed=0)
    with pytest.raises(NotImplementedError, match="GraNet moves every block by itself"):
        sk.GraNet(conv, torch.optim.SGD(conv.parameters(), lr=0.1), stop=400)
    model = make()
    with pytest.raises(ValueError, match="sketches is 0"):
        sk.GraNet(model, torch.optim.SGD(model.parameters()), stop=400, sketches=0)
    assert model(batch(0)).shape == (6, 4)
