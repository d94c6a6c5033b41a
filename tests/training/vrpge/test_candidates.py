"""Units: what they are made of, what they cost, where they go."""

from __future__ import annotations

import pytest
import torch

import sparsekern as sk
from sparsekern.topology import Grid, check_tied, from_mask, generator_for
from sparsekern.training.vrpge.candidates import Candidates

#   slots by place:    0 . 1 .     3 x 4 blocks of 2 x 2 in a matrix of 5 x 7: the last row and column stick out
#                      . 2 . 3
#                      . . 4 5
MASK = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]])


def layer() -> sk.SparseLinear:
    return sk.SparseLinear(7, 5, topology=from_mask(Grid(5, 7, (2, 2)), MASK), capacity=8)


@pytest.mark.parametrize(
    ("group", "units", "costs"),
    [
        ("block", [0, 1, 2, 3, 4, 5, 6, 6], [4, 4, 4, 2, 2, 1]),
        ("row", [0, 0, 1, 1, 2, 2, 3, 3], [8, 6, 3]),
        ("column", [0, 2, 1, 3, 2, 3, 4, 4], [4, 4, 6, 3]),
        (lambda m: torch.tensor([7, 7, 3, 3, 7, 7, 0, 0]), [1, 1, 0, 0, 1, 1, 2, 2], [6, 11]),
    ],
    ids=["block", "row", "column", "function"],
)
def test_units_and_costs_of_real_elements(group, units, costs):
    candidates = Candidates(layer(), group)
    assert candidates.unit.tolist() == units and candidates.count == len(costs)
    assert candidates.costs().tolist() == costs
    chosen = torch.arange(candidates.count) == 1
    assert candidates.slots(chosen).tolist() == [u == 1 for u in units]


def test_blocks_of_tied_taps_are_one_unit_and_columns_are_those_of_all_taps():
    conv = sk.SparseConv2d(8, 8, 3, block_size=4, sparsity=0.5, tie_taps=True, seed=0)
    blocks = Candidates(conv, "block")
    assert blocks.count == conv.topology.blocks() // 9 and (torch.bincount(blocks.unit) == 9).all()
    for group in ("block", "row", "column"):
        candidates = Candidates(conv, group)
        kept = candidates.slots(torch.arange(candidates.count) == 0)
        check_tied(sk.topology.Topology(conv.grid, conv.row.masked_fill(~kept, -1), conv.col.masked_fill(~kept, -1)))


def test_columns_of_a_grouped_convolution_are_its_own_channels():
    conv = sk.SparseConv2d(8, 8, 1, groups=2, block_size=2, sparsity=0, seed=0)
    candidates = Candidates(conv, "column")
    assert candidates.count == 4, "two groups of two block columns each"


def test_a_refill_is_at_new_empty_places_and_within_the_limit():
    module = layer()
    candidates = Candidates(module, "block")
    dead = torch.tensor([True, False, True, True, False, True])
    for seed in range(20):
        units, move = candidates.refill(dead, 3, generator_for(seed))
        assert len(set(units.tolist())) == 3 and dead[units].all()
        assert torch.equal(candidates.unit[move.slots].long(), units)
        places = set(zip(move.row.tolist(), move.col.tolist(), strict=True))
        assert len(places) == 3 and not any(MASK[r, c] for r, c in places)
        module.moved(*move)
    units, move = candidates.refill(torch.zeros(6, dtype=torch.bool), 3, generator_for(0))
    assert not units.numel() and not move.slots.numel()


def test_each_dead_unit_and_each_empty_place_is_drawn():
    candidates = Candidates(layer(), "block")
    seen, places = set(), set()
    for seed in range(100):
        units, move = candidates.refill(torch.ones(6, dtype=torch.bool), 1, generator_for(seed))
        seen.add(int(units))
        places.add((int(move.row), int(move.col)))
    assert seen == set(range(6)) and places == {(0, 1), (0, 3), (1, 0), (1, 2), (2, 0), (2, 1)}


def test_a_refill_of_tied_taps_moves_all_of_them():
    conv = sk.SparseConv2d(16, 16, 3, block_size=4, sparsity=0.5, tie_taps=True, seed=0)
    candidates = Candidates(conv, "block")
    for seed in range(5):
        units, move = candidates.refill(torch.ones(candidates.count, dtype=torch.bool), 3, generator_for(seed))
        assert units.shape == (3,) and move.slots.shape == (27,)
        conv.move_(*move)
        assert all(len(set((conv.col[candidates.unit == u] // 4).tolist())) == 9 for u in units)
        check_tied(conv.topology)


def test_a_full_grid_has_no_place():
    module = sk.SparseLinear(8, 8, block_size=2, sparsity=0)
    units, _ = Candidates(module, "block").refill(torch.ones(16, dtype=torch.bool), 9, generator_for(0))
    assert not units.numel()


@pytest.mark.parametrize(
    ("group", "text"),
    [
        ("head", "group is 'head'; it must be one of block, row, column or a function of the layer"),
        (lambda m: torch.ones(3), r"group returned torch.float32 \(3,\); it must return whole numbers \(8,\)"),
        (lambda m: 1, "group returned int"),
    ],
)
def test_groups_that_are_none(group, text):
    with pytest.raises(ValueError, match=text):
        Candidates(layer(), group)


def test_a_layer_without_a_block():
    module = sk.SparseLinear(8, 8, block_size=4, blocks=1)
    free = torch.tensor([-1], dtype=torch.int32)
    module.move_(torch.tensor([0]), free, free)
    with pytest.raises(ValueError, match="the layer has no block to choose from"):
        Candidates(module, "block")
