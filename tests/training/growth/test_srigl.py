"""SRigL on a hand-worked 4x4 grid: a constant fan-in, neurons that go, and one that returns."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.topology import generator_for
from tests.training.grids import advance, grid_layer, over, places, step
from tests.training.test_base import batch, bits, built, check_resumed, equal, make


def build(block: int, **options):
    model = nn.Sequential(grid_layer(block), nn.Linear(4 * block, 1))
    return model[0], over(model, sk.SRigL, drop_fraction=lambda step: 0.5, allow_dense_scores=True, **options)


@pytest.mark.parametrize(("block", "scoring"), [(1, "exact"), (2, "exact"), (2, "screen")])
def test_two_updates_by_hand(block, scoring):
    layer, method = build(block, scoring=scoring)
    # Salient are norms 9, 8, 4 and the places of 16, 14, 12: 1, 0, 2 and 3 a row. The second row goes; k = 6 / 3.
    # 9, 8 and 4 stay; each row grows one more: 3.5, 12, and 16, which is the place of norm 3: it keeps its values.
    assert step(layer, method)
    assert places(layer) == [(0, 0), (0, 1), (2, 0), (2, 3), (3, 0), (3, 3)]
    assert layer.values[[1, 2]].eq(0).all() and layer.values[4, 0, 0] == 3 / block
    assert method.metrics()["ablated/0"] == 0.25 and method.metrics()["churn/0"] == 2 / 6
    # With g = 1, 10, 3, 4 the largest scores are 40, 35 and 20 of the second row, which returns: 1, 3, 1 and 1. Four
    # rows share six blocks: one each, and one more for the second and the first. 9, 8 and 4 stay; the first row grows
    # at 3.5, where it has a block, the second at 40 and 35.
    assert step(layer, method, [1.0, 10.0, 3.0, 4.0])
    assert places(layer) == [(0, 0), (0, 1), (1, 0), (2, 3), (1, 1), (3, 3)]
    assert method.metrics()["ablated/0"] == 0 and layer.topology.blocks() == 6


def test_a_neuron_may_lose_its_strongest_block_and_its_fan_in_is_bounded():
    """Two places are needed: the first two rows go, with norm 9, and the others have three blocks each."""
    layer, method = build(2, min_salient=2)
    assert step(layer, method)
    assert sorted(places(layer)) == [(2, 0), (2, 1), (2, 3), (3, 0), (3, 1), (3, 3)]
    # Needed are 6 / 4 rounded up: two rows of four places, of which the third row has none that is salient enough.
    layer, method = build(2, min_salient=3)
    assert step(layer, method) and sorted(set(layer.row.tolist())) == [2, 3]


@pytest.mark.parametrize("last", [False, True])
def test_no_neuron_of_the_last_layer_goes_nor_any_without_ablation(last):
    layer, method = build(2, ablate=last)
    if last:
        method = sk.SRigL(layer, method.optimizer, drop_fraction=lambda step: 0.5, update_every=1)
    assert step(layer, method)
    # Four rows, one block each, and one more in the rows with 3 and 2 salient places
    assert sorted(places(layer)) == [(0, 0), (1, 0), (2, 0), (2, 3), (3, 0), (3, 3)]


@pytest.mark.parametrize(("blocks", "rows", "cols"), [(30, 7, 9), (60, 9, 7), (5, 8, 8), (63, 7, 9)])
def test_rows_differ_by_one_block_at_most_and_the_number_stays(blocks, rows, cols):
    torch.manual_seed(0)
    layer = sk.SparseLinear(2 * cols, 2 * rows, blocks=blocks, block_size=2, capacity=blocks + 2, seed=0)
    model = nn.Sequential(layer, nn.Linear(2 * rows, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    method = sk.SRigL(model, optimizer, update_every=1, drop_fraction=0.4)
    for at in range(6):
        model(torch.randn(16, 2 * cols, generator=generator_for(at))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        before = layer.topology.keys().clone(), layer.values.detach().clone()
        method.step()
        layer.topology.validate()
        fan_in = torch.bincount(layer.row[layer.row >= 0], minlength=rows)
        assert fan_in.sum() == blocks and len(fan_in[fan_in > 0].unique()) <= 2
        assert fan_in.max() - fan_in[fan_in > 0].min() <= 1
        stayed = layer.topology.keys() == before[0]
        assert torch.equal(layer.values[stayed], before[1][stayed]) and not layer.values[~stayed].any()


def test_a_layer_that_was_not_used_stays():
    model = make()
    method = over(model, sk.SRigL)
    before = bits(model)
    (0 * model(batch(0))).sum().backward()
    assert not advance(method) and equal(bits(model), before)


@pytest.mark.parametrize("scoring", ["exact", "screen"])
@pytest.mark.parametrize("at", [5, 7])
def test_saved_loaded_and_continued_bit_for_bit(scoring, at):
    """Updates after steps 4, 8 and 12: after 7 a probe is armed."""
    options = {"update_every": 4, "stop": 13, "scoring": scoring}
    model, _, _ = check_resumed(lambda seed: built(sk.SRigL, seed, **options), at, 14)
    first, last = (sk.sparse_layers(network).values() for network in (make(), model))
    assert any(places(a) != places(b) for a, b in zip(first, last, strict=True))


def test_several_backwards_a_step_are_ranked_by_sketches(caplog):
    model, _, method = built(sk.SRigL, update_every=1)
    for _ in range(2):
        for part in batch(0).chunk(2):
            model(part).square().mean().backward()
        moved = advance(method)
    assert moved and "screens its blocks by sketches" in caplog.text


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"min_salient": -1}, "min_salient is -1; it must be 0 or more"),
        ({"min_salient": float("inf")}, "min_salient is inf"),
        *(({name: 1}, f"{name} is no option of SRigL") for name in sk.SRigL.unused_options),
    ],
)
def test_what_is_refused(options, text):
    model = make()
    with pytest.raises(ValueError, match=text) as raised:
        sk.SRigL(model, torch.optim.SGD(model.parameters()), **options)
    assert raised.value.parameter == next(iter(options))
