"""Layers that compete for blocks, by hand."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.topology import Grid, Topology
from sparsekern.training.scores import Offer, share_out

INF = torch.inf


def layer(row: list[int], col: list[int], block: int = 1) -> sk.SparseLinear:
    places = [torch.tensor(p, dtype=torch.int32) for p in (row, col)]
    used = int((places[0] >= 0).sum())
    topology = Topology(Grid(2 * block, 4 * block, (block, block)), *(p[:used] for p in places))
    return sk.SparseLinear(4 * block, 2 * block, topology=topology, capacity=len(row))


def offer(scores: dict[int, float]) -> Offer:
    return Offer(torch.tensor(sorted(scores)), torch.tensor([scores[k] for k in sorted(scores)]))


#             layer a: 3 blocks, 1 free slot        layer b: 4 blocks, no free slot
#   strength      5    1    2   (free)                  9    4    3    6
#   offers        key 3: 8   4: 7   5: 1   6: 6         key 4: 5   5: 9   6: 2   7: 1
A = ([0, 0, 0, -1], [0, 1, 2, -1])
B = ([0, 0, 0, 0], [0, 1, 2, 3])
STRENGTHS = {"a": torch.tensor([5.0, 1, 2, INF]), "b": torch.tensor([9.0, 4, 3, 6])}
OFFERS = {"a": offer({3: 8, 4: 7, 5: 1, 6: 6}), "b": offer({4: 5, 5: 9, 6: 2, 7: 1})}


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, {"a": [], "b": []}),
        # weakest: a1. Best: b5, but b has no room; a3
        (1, {"a": [(1, 3)], "b": []}),
        # weakest: a1, a2. Best with room: a3, a4 (a6 is third, b5 has none)
        (2, {"a": [(1, 3), (2, 4)], "b": []}),
        # weakest: a1, a2, b2. Best: b5, a3, a4
        (3, {"a": [(1, 3), (2, 4)], "b": [(2, 5)]}),
        # weakest: a1, a2, b2, b1. Best: b5, a3, a4, and a6 goes to the free slot, so b1 becomes free
        (4, {"a": [(1, 3), (2, 4), (3, 6)], "b": [(1, -1), (2, 5)]}),
        # the strongest of each layer stay: with b3 five can be dropped. Best: b5, a3, a4, a6, b4
        (9, {"a": [(1, 3), (2, 4), (3, 6)], "b": [(1, 4), (2, 5), (3, -1)]}),
    ],
)
def test_by_hand(count, expected):
    layers = {"a": layer(*A), "b": layer(*B)}
    moves = share_out(layers, STRENGTHS, OFFERS, count)
    for name, move in moves.items():
        keys = torch.where(move.row < 0, -1, move.row * 4 + move.col)
        found = dict(zip(move.slots.tolist(), keys.tolist(), strict=True))
        wanted = dict(expected[name])
        assert found.keys() == wanted.keys() and sorted(found.values()) == sorted(wanted.values())
        layers[name].move_(*move)
    assert sum(m.topology.blocks() for m in layers.values()) == 7


def test_fewer_move_when_there_are_too_few_places():
    layers = {"a": layer(*A), "b": layer(*B)}
    offers = {"a": offer({}), "b": offer({4: 5, 5: 9})}
    moves = share_out(layers, STRENGTHS, offers, 3)
    # three weakest: a1, a2, b2, so b has room for one; with one: a1 alone, no room in b: nothing
    assert moves["a"].slots.numel() == moves["b"].slots.numel() == 0


def test_layers_of_other_block_sizes_compare_by_element():
    layers = {"a": layer(*A), "b": layer(*B, block=2)}
    strengths = {"a": torch.tensor([5.0, 4, 4, INF]), "b": torch.tensor([9.0, 6, 7, 8])}  # halved: 4.5 3 3.5 4
    moves = share_out(layers, strengths, {"a": offer({3: 1}), "b": offer({5: 1.5})}, 1)
    # b1 is the weakest, at 3 an element; a's offer of 1 beats b's of 0.75 and takes the free slot
    assert moves["b"].slots.tolist() == [1] and moves["b"].row.tolist() == [-1]
    assert moves["a"].slots.tolist() == [3] and moves["a"].col.tolist() == [3]


@pytest.mark.parametrize("kind", [sk.RigL, sk.GSE])
def test_blocks_go_where_the_gradient_is(kind):
    """The second layer's gradient is a hundred times the first's: it gains blocks at the other's expense."""
    torch.manual_seed(0)
    parts = [sk.SparseLinear(32, 32, block_size=4, blocks=20, capacity=26, seed=s, name=str(s)) for s in range(2)]
    model = nn.ModuleList(parts)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    method = kind(model, optimizer, update_every=2, scope="global", drop_fraction=lambda step: 0.2)
    for _ in range(10):
        x = torch.randn(8, 32)
        (parts[0](x).square().mean() + 100 * parts[1](x).square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        method.step()
    first, second = (p.topology.blocks() for p in parts)
    assert first + second == 40 and first < 20 < second <= 26
    metrics = method.metrics()
    assert metrics["sparsity/1"] < metrics["sparsity/0"] and metrics["sparsity/global"] == 1 - 40 / 128


def test_a_default_device_plays_no_part():
    layers = {"a": layer(*A), "b": layer(*B)}
    wanted = share_out(layers, STRENGTHS, OFFERS, 4)
    with torch.device("meta"):
        found = share_out(layers, STRENGTHS, OFFERS, 4)
    for name in layers:
        assert all(torch.equal(a, b) for a, b in zip(found[name], wanted[name], strict=True))


def three_layers(capacity: float) -> nn.Module:
    """30 - 60 - 40 - 10 at 80 %: Erdos-Renyi gives the three layers 345, 383 and 192 elements."""
    model = nn.Sequential(nn.Linear(30, 60), nn.ReLU(), nn.Linear(60, 40), nn.ReLU(), nn.Linear(40, 10))
    return sk.sparsify_(model, 0.8, 1, distribution="er-matrix", capacity=capacity)


def counts(model: nn.Module) -> list[int]:
    return [layer.topology.blocks() for layer in sk.sparse_layers(model).values()]


@pytest.mark.parametrize(("capacity", "moves"), [(1.0, False), (1.25, True)])
def test_layers_need_free_slots_to_compete_and_a_warning_says_so(capacity, moves, caplog):
    model = three_layers(capacity)
    assert counts(model) == [345, 383, 192]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with caplog.at_level(logging.WARNING):
        method = sk.GSE(model, optimizer, update_every=1, scope="global", stop=20)
    said = "scope is 'global', but no layer has a free slot, so each keeps its number of blocks: 0, 2, 4. For layers"
    assert [said in record.message for record in caplog.records if record.levelname == "WARNING"] == (
        [] if moves else [True]
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        x = torch.randn(64, 30, generator=generator)
        nn.functional.cross_entropy(model(x), x[:, :10].argmax(1)).backward()
        optimizer.step()
        optimizer.zero_grad()
        method.step()
    assert method.updates > 5 and sum(counts(model)) == 920 and (counts(model) != [345, 383, 192]) == moves


@pytest.mark.parametrize("case", ["one layer", "full grids", "room in one", "scope"])
def test_no_warning_where_layers_compete_or_cannot(case, caplog):
    model = three_layers({"one layer": 1, "full grids": 1, "room in one": {"2": 1.1}, "scope": 1}[case])
    if case == "one layer":
        model = model[:1]
    if case == "full grids":
        model = sk.sparsify_(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), 0, 1)
    scope = "layer" if case == "scope" else "global"
    with caplog.at_level(logging.WARNING):
        sk.GSE(model, torch.optim.SGD(model.parameters(), lr=0.1), scope=scope)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
