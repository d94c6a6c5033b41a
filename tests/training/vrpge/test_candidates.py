"""Units: what they are made of, what they cost, where they go."""

from __future__ import annotations

import pytest
import torch

import sparsekern as sk
from sparsekern.topology import Grid, check_tied, from_mask, generator_for
from sparsekern.training.vrpge.budget import Budget, Candidates

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
        move = candidates.refill(dead, 3, generator_for(seed))
        units = candidates.unit[move.slots].long()
        assert len(set(units.tolist())) == 3 and dead[units].all()
        places = set(zip(move.row.tolist(), move.col.tolist(), strict=True))
        assert len(places) == 3 and not any(MASK[r, c] for r, c in places)
        module.moved(*move)
    assert not candidates.refill(torch.zeros(6, dtype=torch.bool), 3, generator_for(0)).slots.numel()


def test_each_dead_unit_and_each_empty_place_is_drawn():
    candidates = Candidates(layer(), "block")
    seen, places = set(), set()
    for seed in range(100):
        move = candidates.refill(torch.ones(6, dtype=torch.bool), 1, generator_for(seed))
        seen.add(int(candidates.unit[move.slots]))
        places.add((int(move.row), int(move.col)))
    assert seen == set(range(6)) and places == {(0, 1), (0, 3), (1, 0), (1, 2), (2, 0), (2, 1)}


def test_a_refill_of_tied_taps_moves_all_of_them():
    conv = sk.SparseConv2d(16, 16, 3, block_size=4, sparsity=0.5, tie_taps=True, seed=0)
    candidates = Candidates(conv, "block")
    for seed in range(5):
        move = candidates.refill(torch.ones(candidates.count, dtype=torch.bool), 3, generator_for(seed))
        units = candidates.unit[move.slots].unique()
        assert units.shape == (3,) and move.slots.shape == (27,)
        conv.move_(*move)
        assert all(len(set((conv.col[candidates.unit == u] // 4).tolist())) == 9 for u in units)
        check_tied(conv.topology)


def test_a_full_grid_has_no_place():
    module = sk.SparseLinear(8, 8, block_size=2, sparsity=0)
    assert not Candidates(module, "block").refill(torch.ones(16, dtype=torch.bool), 9, generator_for(0)).slots.numel()


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


def budget(sparsity=None, scope="global", costs=None, floor=0.0, group="block"):
    a = sk.SparseLinear(16, 16, block_size=4, sparsity=0.5, seed=0)  # 8 candidates of 16 places
    b = sk.SparseLinear(16, 32, block_size=4, sparsity=0, seed=0)  # 32 of 32
    candidates = {"a": Candidates(a, group), "b": Candidates(b, group)}
    return Budget(candidates, sparsity, scope, costs, floor, "sort")


def test_the_ratio_of_the_candidates_and_their_places():
    found = budget(0.75)  # 12 of 48 places, of 40 candidates
    assert found.ratio == pytest.approx(0.3) and found.units == 40
    assert found.parts["a"] == slice(0, 8) and found.parts["b"] == slice(8, 40)
    assert budget().ratio == 0.5


def test_a_global_budget_lets_layers_compete_and_one_of_each_layer_does_not():
    wanted = torch.cat([torch.ones(8), torch.zeros(32) + 0.2])
    both = budget(0.75).project(wanted)
    assert float(both.sum()) == pytest.approx(12, rel=1e-6) and float(both[:8].sum()) > 7
    each = budget(0.75, scope="layer").project(wanted)
    assert float(each[:8].sum()) == pytest.approx(2.4, rel=1e-6) and float(each[8:].sum()) == pytest.approx(6.4)


def test_the_top_is_the_exact_number():
    s = torch.linspace(0, 1, 40)
    assert budget(0.75).top(s).nonzero().squeeze(1).tolist() == list(range(28, 40))
    assert budget(0.75, scope="layer").top(s).sum() == 2 + 9


def test_costs_make_operations_of_elements():
    # elements of a cost 9: 9 * 8 + 32 = 104 candidates' worth, of 9 * 16 + 32 = 176 in all, of which a quarter stays
    found = budget(0.75, costs={"a": 9.0})
    assert found.ratio == pytest.approx(44 / 104)
    s = found.project(torch.ones(40))
    assert 9 * float(s[:8].sum()) + float(s[8:].sum()) == pytest.approx(44, rel=1e-5)
    assert s[:8].max() < s[8:].min(), "the dear ones lose more"


def filters(costs, sparsities=(0.0, 0.0, 0.0)) -> Budget:
    """The filters of three convolutions, of 144, 144 and 576 elements."""
    sizes = ((16, 16), (16, 32), (64, 64))
    layers = [
        sk.SparseConv2d(*size, 3, block_size=1, sparsity=s, seed=0) for size, s in zip(sizes, sparsities, strict=True)
    ]
    return Budget({str(i): Candidates(m, "row") for i, m in enumerate(layers)}, 0.5, "global", costs, 0.0, "sort")


def test_with_units_that_cost_the_same_no_filter_pays_for_its_size():
    """Equal wishes get equal probabilities; counted by elements small filters push the large ones out."""
    found = filters("units")
    s = found.project(torch.full((112,), 0.9))
    assert torch.allclose(s, torch.full_like(s, 0.5)) and found.ratio == 0.5
    assert found.top(torch.linspace(1, 0, 112)).sum() == 56, "half of the filters, of whatever layer"
    by_elements = filters(None).project(torch.full((112,), 0.9))
    assert by_elements[:48].min() > by_elements[48:].max() + 0.2
    assert float(by_elements[:48].sum() * 144 + by_elements[48:].sum() * 576) == pytest.approx(
        (48 * 144 + 64 * 576) / 2
    )


def test_units_of_layers_that_store_a_part_of_their_blocks():
    """A quarter and three quarters stored: the filters of a whole layer would be 4 and 4/3 times those candidates."""
    found = filters("units", (0.75, 0.25, 0.0))
    assert found.ratio == pytest.approx(0.5 * (16 * 4 + 32 * 4 / 3 + 64) / 112, rel=1e-3)
    found.refresh()
    assert torch.allclose(found.project(torch.ones(112)), torch.tensor(found.ratio))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"sparsity": 0.1}, r"sparsity is 0.1, but the layers store too few .* sparsity 0.1667. Build them at .* 0"),
        ({"sparsity": 1.5}, "sparsity is 1.5"),
        ({"costs": {"c": 1.0}}, "costs names c; the layers are a, b"),
        ({"costs": {"a": 0.0}}, "costs of 'a' is 0.0; it must be above 0"),
        ({"costs": "filters"}, "costs is 'filters'; it must be 'units', or numbers by the names of layers"),
        ({"floor": 0.6}, "floor is 0.6; it must be 0 to 0.5, the fraction of the candidates that may remain"),
    ],
)
def test_errors(options, text):
    with pytest.raises(ValueError, match=text):
        budget(**options)


def test_expected_elements():
    found = budget(0.75)
    s = torch.zeros(40).index_fill_(0, torch.tensor([0, 3]), 0.25)
    assert found.expected_elements("a", s) == 0.5 * 16 and found.expected_elements("b", s) == 0
