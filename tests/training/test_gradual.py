"""Gradual pruning on hand-worked 4x4 grids."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.topology import check_tied
from tests.training.grids import advance, free, grid_layer, over
from tests.training.test_base import built, check_resumed, make, train


def gradual(model: nn.Module, **options) -> sk.Gradual:
    return over(model, sk.Gradual, **({"final_sparsity": 0.875, "stop": 3} | options))


@pytest.mark.parametrize("block", [2, 1])
def test_two_updates_by_hand(block):
    """6 of 16 blocks to 2 in two updates: 2 + 4 * (1 - 1/2)**3 = 2.5, rounded up, and then 2."""
    layer = grid_layer(block)
    method = gradual(layer)
    assert advance(method) and free(layer) == [1, 2, 4], "norms 1, 2 and 3"
    assert not layer.values[[1, 2, 4]].any() and layer.values[0, 0, 0] == 9 / block
    assert advance(method) and free(layer) == [1, 2, 4, 5], "and 4"
    assert not advance(method) and method.metrics()["sparsity/"] == 0.875
    x = torch.randn(3, 4 * block)
    torch.testing.assert_close(layer(x), x @ layer.dense_weight().T + layer.bias)


def test_two_updates_of_two_layers_by_hand():
    """8 of 32 blocks to 4: 4 + 4/8 rounded is 5, then 4. Norms over the root of the block size:

    4.5, 0.5, 1, 4, 1.5, 2 in the first layer, 0.1 and 5 in the second, of which the 5 is the strongest and stays.
    """
    first, second = grid_layer(), sk.SparseLinear(4, 4, block_size=1, blocks=2, seed=0)
    with torch.no_grad():
        second.values.copy_(torch.tensor([0.1, 5]).view(2, 1, 1))
    method = gradual(nn.ModuleList([first, second]), scope="global")
    assert advance(method) and free(first) == [1, 2] and free(second) == [0]
    assert advance(method) and free(first) == [1, 2, 4] and free(second) == [0]
    assert method.metrics()["sparsity/global"] == pytest.approx(1 - (3 * 4 + 1) / (64 + 16))


def test_no_layer_is_emptied():
    first, second = grid_layer(), sk.SparseLinear(8, 8, block_size=2, blocks=2, seed=0)
    with torch.no_grad():
        second.values.copy_(torch.tensor([0.1, 0.01]).view(2, 1, 1))
    for scope, left in (("global", [1, 1]), ("layer", [1, 1])):
        model = copy.deepcopy(nn.ModuleList([first, second]))
        method = gradual(model, scope=scope, final_sparsity=0.99)
        advance(method), advance(method)
        assert [layer.topology.blocks() for layer in model] == left
        assert model[1].values.max() == torch.tensor(0.1)


@pytest.mark.parametrize(
    ("options", "left"),
    [
        # 4 + 12 * (1 - t/10)**3 after steps 2, 4, ... 10
        ({"update_every": 2, "stop": 11}, {2: 10, 4: 7, 6: 5, 8: 4, 10: 4}),
        # start 3: after 4, (4 - 3) / 5 of the way: 4 + 12 * 0.8**3 = 10.1
        ({"update_every": 4, "start": 3, "stop": 9}, {4: 10, 8: 4}),
        # counted one later: 3, 5
        ({"update_every": 2, "offset": 1, "stop": 5}, {3: 6, 5: 4}),
        ({"update_every": 5, "stop": 6}, {5: 4}),
        ({"update_every": 4, "start": 4, "stop": 5}, {4: 4}),
    ],
)
def test_the_cubic_schedule(options, left):
    """Zhu and Gupta 2017, equation 1, from no sparsity."""
    layer = sk.SparseLinear(8, 8, block_size=2, sparsity=0, seed=0)
    method = gradual(layer, final_sparsity=0.75, **options)
    for step in range(1, 13):
        advance(method)
        expected = [blocks for at, blocks in left.items() if at <= step]
        assert layer.topology.blocks() == (expected[-1] if expected else 16)


def test_entries_by_selector_are_groups_of_their_own():
    model = nn.Sequential(*(sk.SparseLinear(8, 8, block_size=2, sparsity=0, seed=i) for i in range(3)))
    with torch.no_grad():
        model[1].values.mul_(100)
    method = gradual(model, final_sparsity={"2": 0.25, "*": 0.75}, scope="global")
    advance(method), advance(method)
    assert model[2].topology.blocks() == 12
    assert model[1].topology.blocks() > model[0].topology.blocks()
    assert sum(layer.topology.blocks() for layer in model[:2]) == 8


def test_frozen_layers_stay_and_strong_rows_stay_connected():
    model = make()
    model[2].values.requires_grad_(False)
    method = gradual(model, final_sparsity=0.8)
    advance(method), advance(method)
    assert model[2].topology.blocks() == 8 and model[0].topology.blocks() < 4
    layer = grid_layer()
    advance(gradual(layer, keep_connected=True, stop=2, final_sparsity=0.9))
    assert free(layer) == [4], "each other block is the strongest of its row or column"


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_tied_taps_go_together(scope):
    model = nn.Sequential(
        sk.SparseConv2d(16, 16, 3, block_size=4, sparsity=0, tie_taps=True, seed=0),
        sk.SparseConv2d(16, 16, 1, block_size=4, sparsity=0, seed=0),
    )
    method = gradual(model, final_sparsity=0.75, scope=scope)
    advance(method), advance(method)
    check_tied(model[0].topology)
    blocks = [layer.topology.blocks() for layer in model]
    assert blocks == [36, 4] if scope == "layer" else abs(sum(blocks) - 40) <= 4


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_saved_loaded_and_continued_bit_for_bit(scope, compact, optimizer):
    kind = partial(getattr(torch.optim, optimizer), lr=0.01, weight_decay=0.1)
    options = {"final_sparsity": 0.8, "update_every": 3, "stop": 17, "scope": scope, "compact": compact}
    model, _, method = check_resumed(lambda seed: built(sk.Gradual, seed, kind, **options), 10, 20)
    assert model[2].topology.blocks() == 3 or scope == "global"
    assert method.first_keys["2"].shape[0] == 8


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "Adafactor"])
def test_giving_memory_back_changes_no_number(optimizer):
    """Weight decay and momentum leave free slots at zero, so it does not matter whether they are there."""

    def run(compact):
        options = {"lr": 0.01, "weight_decay": 0.1} | ({"momentum": 0.9} if optimizer == "SGD" else {})
        kind = partial(getattr(torch.optim, optimizer), **options)
        parts = built(sk.Gradual, 0, kind, final_sparsity=0.8, update_every=2, stop=9, compact=compact)
        train(*parts, range(12))
        return parts[0]

    full, small = run(False), run(True)
    for a, b in zip(full[::2], small[::2], strict=True):
        used = a.topology.used()
        assert b.values.shape[0] == int(used.sum()) < used.shape[0]
        if optimizer == "Adafactor":  # its step depends on means over all slots
            continue
        assert torch.equal(a.values[used], b.values) and torch.equal(a.row[used], b.row)


def test_the_copy_of_a_model_follows():
    model, optimizer, method = built(sk.Gradual, final_sparsity=0.8, update_every=1, stop=3, compact=True)
    average = torch.optim.swa_utils.AveragedModel(model)
    method.follow(average)
    for step in range(3):
        train(model, optimizer, method, [step])
        average.update_parameters(model)
    for layer, twin in zip(model[::2], average.module[::2], strict=True):
        assert torch.equal(layer.row, twin.row) and twin.values.shape == layer.values.shape


REFUSED = [
    ({"final_sparsity": 1.0}, ValueError, r"final_sparsity is 1.0; it is the fraction absent and must be in \[0, 1\)"),
    ({"final_sparsity": 0.2}, ValueError, "final_sparsity is 0.2, and all layers are sparser already"),
    ({"final_sparsity": {"0": 0.9}}, ValueError, "final_sparsity has no entry that matches '2'"),
    ({"final_sparsity": {"head": 0.9}}, ValueError, "final_sparsity: 'head' matches no module"),
    ({"final_sparsity": "0.9"}, TypeError, "final_sparsity is '0.9'; it must be a number"),
    ({"stop": None}, ValueError, "stop is None; it must be a step after which the final sparsity stays"),
    ({"stop": 5, "update_every": 5}, ValueError, "stop is 5; it must be a step after which"),
    ({"start": 6, "stop": 10, "update_every": 5}, ValueError, "stop is 10; it must be a step after which"),
    ({"scope": "model"}, ValueError, "scope is 'model'; it must be one of layer, global"),
    *(
        ({name: 1}, ValueError, f"{name} is no option of Gradual")
        for name in ("drop_fraction", "anneal", "grown_state", "min_age", "subset_factor")
    ),
]


@pytest.mark.parametrize(("options", "kind", "text"), REFUSED)
def test_options_out_of_range_are_named(options, kind, text):
    with pytest.raises(kind, match=text):
        gradual(make(), **options)


def test_compact_is_refused_where_slots_cannot_go(monkeypatch):
    model = make()
    method = gradual(model, compact=True)
    with pytest.raises(ValueError, match="compact is True, with which slots go: no tensor can follow"):
        method.follow(torch.zeros(model[0].values.shape[0]), layer="0")
    with pytest.raises(ValueError, match="compact is True, with which slots go: no tensor can follow"):
        sk.AGENT(model, method.optimizer, method=method)
    monkeypatch.setattr("sparsekern.training.distributed.Ranks.count", 2)
    with pytest.raises(ValueError, match="compact is True, but DistributedDataParallel holds the parameters"):
        gradual(make(), compact=True, check_ranks=False)
