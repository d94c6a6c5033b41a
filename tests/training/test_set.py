"""SET on hand-worked 4x4 grids."""

from __future__ import annotations

import copy

import pytest
import torch

import sparsekern as sk
from sparsekern.topology import Move, check_tied, generator_for
from tests.training.grids import MASK, advance, grid_layer, over, places


def chosen(module, fraction: float, seed: int = 0, **options) -> Move:
    return over(module, sk.SET, **options).choose("", module, fraction, generator_for(seed))


def choose(fraction: float, seed: int = 0, **options):
    module = grid_layer(capacity=7)
    return module, chosen(module, fraction, seed, **options)


@pytest.mark.parametrize(
    ("fraction", "dropped"),
    [
        (0.0, []),
        (0.16, []),
        (0.17, [1]),
        (0.34, [1, 2]),
        (0.5, [1, 2, 4]),
        (0.7, [1, 2, 4, 5]),
        (1.0, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_the_weakest_blocks_are_dropped_rounding_down(fraction, dropped):
    _, move = choose(fraction)
    assert move.slots.tolist() == dropped


def test_a_decimal_fraction_counts_as_it_is_written():
    """0.29 of 100 is 28.999999999999996 in floats."""
    assert chosen(sk.SparseLinear(40, 40, block_size=2, blocks=100), 0.29).slots.numel() == 29


def test_with_keep_connected_no_row_or_column_is_emptied():
    # row 1 and column 1 have only block 2, column 2 only block 1: both stay. Strongest of row 3: 4 (slot 5);
    # of column 0: 9, of column 3 and row 2: 8. So only slot 4 (norm 3) may go.
    _, move = choose(1.0, keep_connected=True)
    assert move.slots.tolist() == [4]


def test_growth_is_in_places_that_were_empty_and_distinct():
    for seed in range(30):
        module, move = choose(0.5, seed)
        cells = list(zip(move.row.tolist(), move.col.tolist(), strict=True))
        assert len(set(cells)) == 3
        assert not any(MASK[r, c] for r, c in cells), "a dropped block does not return at once"
        module.move_(*move)
        assert module.topology.blocks() == 6


def test_growth_is_uniform_over_the_empty_places():
    draws = 3000
    counts = torch.zeros(4, 4)
    module = grid_layer(capacity=7)
    method = over(module, sk.SET)
    for seed in range(draws):
        move = method.choose("", module, 0.34, generator_for(seed))  # two of ten empty places
        counts[move.row.long(), move.col.long()] += 1
    assert (counts[MASK.bool()] == 0).all()
    expected = draws * 2 / 10
    # inclusion of a place is Bernoulli(0.2): five standard deviations around the mean
    assert ((counts[~MASK.bool()] - expected).abs() < 5 * (draws * 0.2 * 0.8) ** 0.5).all()


def test_no_more_blocks_move_than_there_are_empty_places():
    for blocks in (16, 15):
        assert chosen(sk.SparseLinear(8, 8, block_size=2, blocks=blocks), 1.0).slots.numel() == 16 - blocks


def test_the_drop_fraction_ends_at_zero():
    module = grid_layer(capacity=7)
    method = over(module, sk.SET, stop=8, drop_fraction=0.5)
    churn = []
    for _ in range(10):
        module(torch.ones(1, 8)).sum().backward()
        churn.append(round(6 * method.metrics()["churn/"]) if advance(method) else None)
    # floor(6 * 0.25 (1 + cos(pi t / 8))): t = 1 2 3 4 5 6 7
    assert churn == [2, 2, 2, 1, None, None, None, None, None, None]


@pytest.mark.parametrize("keep_connected", [False, True])
def test_tied_taps_move_together(keep_connected):
    module = sk.SparseConv2d(32, 32, 3, block_size=8, sparsity=0.5, tie_taps=True, seed=0, capacity=90)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    method = sk.SET(module, optimizer, update_every=1, drop_fraction=0.4, keep_connected=keep_connected)
    for _ in range(4):
        before = set(places(module))
        module(torch.randn(2, 32, 6, 6)).square().mean().backward()
        assert advance(method)
        check_tied(module.topology)
        after = set(places(module))
        assert len(after - before) == len(before - after) == 3 * 9 or keep_connected  # floor(0.4 * 8) cells of channels
        assert len(after) == 73 and (-1, -1) in after


def test_the_weakest_channels_of_tied_taps_go_by_their_common_norm():
    """One tap of the first cell is the weakest block, and one the strongest."""
    module = sk.SparseConv2d(4, 4, (1, 2), block_size=2, blocks=4, tie_taps=True, seed=0)
    with torch.no_grad():
        module.values.copy_(torch.tensor([0.0, 9, 3, 4]).view(4, 1, 1))
    assert chosen(module, 0.5).slots.tolist() == [2, 3]


def test_a_method_that_parts_tied_taps_is_stopped_before_anything_moves():
    class Loose(sk.SET):
        def choose(self, name, layer, fraction, generator):
            move = super().choose(name, layer, fraction, generator)
            return move._replace(slots=move.slots[:1], row=move.row[:1], col=move.col[:1])

    module = sk.SparseConv2d(16, 16, 3, block_size=8, sparsity=0.5, tie_taps=True, seed=0)
    method = Loose(module, torch.optim.SGD(module.parameters()), drop_fraction=0.5)
    before = module.row.clone()
    with pytest.raises(ValueError, match="taps; with tie_taps=True it must be all or none"):
        method.update()
    assert torch.equal(module.row, before)


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize(
    ("fraction", "dropped"), [(0.2, [0]), (0.34, [0, 1, 2]), (0.5, [0, 1, 2, 3, 4]), (0.75, [0, 1, 2, 3, 4, 5, 6])]
)
def test_the_weakest_of_each_sign_are_dropped(fraction, dropped, block):
    """Of six positive ones 1, 2, 3, 4 and of four negative ones 0, 1, 2, 3, rounding down for each sign."""
    module = sk.SparseLinear(40 * block, block, block_size=block, blocks=10, bias=False, seed=0)
    with torch.no_grad():
        numbers = torch.tensor([1, -1.5, 2, -2.5, 3, -3.5, 4, 5, 6, -10])
        module.values.copy_((numbers / block).view(-1, 1, 1).expand_as(module.values))
    move = chosen(module, fraction, drop="signs")
    assert move.slots.tolist() == dropped and len(set(move.col.tolist())) == len(dropped)
    assert not torch.isin(move.col, module.col).any()


def test_signs_with_little_room_with_free_slots_and_with_tied_taps():
    module = sk.SparseLinear(12, 1, block_size=1, blocks=10, capacity=11, bias=False, seed=0)
    with torch.no_grad():
        module.values.copy_(torch.tensor([1, -1.5, 2, -2.5, 3, -3.5, 4, 5, 6, -10, 0]).view(-1, 1, 1))
    assert chosen(module, 0.5, drop="signs").slots.tolist() == [0, 1], "two places are empty"
    conv = sk.SparseConv2d(8, 8, (1, 2), block_size=2, sparsity=0.5, tie_taps=True, seed=0)
    method = sk.SET(conv, torch.optim.SGD(conv.parameters(), lr=0.1), drop="signs", drop_fraction=0.5)
    assert method.update()
    check_tied(conv.topology)


def test_grown_blocks_may_have_random_values():
    module = sk.SparseLinear(32, 32, block_size=4, sparsity=0.5, seed=0, init_scale=2.0)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    method = sk.SET(module, optimizer, grown_values="random", drop_fraction=0.25)
    module(torch.ones(1, 32)).sum().backward()
    optimizer.step()
    before, places = module.values.detach().clone(), module.topology.keys().clone()
    assert method.update()
    moved = module.topology.keys() != places
    assert moved.sum() == 8 and torch.equal(module.values[~moved], before[~moved])
    grown = module.values[moved].detach()
    bound = 2 / (4 * torch.bincount(module.row, minlength=8)).sqrt()[module.row[moved].long()].view(-1, 1, 1)
    assert (grown != 0).all() and (grown.abs() <= bound).all() and (grown.abs() > 0.9 * bound).any()
    assert not optimizer.state[module.values]["momentum_buffer"][moved].any()
    other = sk.SparseLinear(32, 32, block_size=4, sparsity=0.5, seed=0, init_scale=2.0)
    other.load_state_dict(module.state_dict())
    method.steps = 1
    assert method.update() and not torch.equal(module.values[moved], grown), "other numbers at another step"


def test_random_values_stay_within_the_matrix():
    module = sk.SparseLinear(7, 5, block_size=4, blocks=2, seed=0)
    method = sk.SET(module, torch.optim.SGD(module.parameters(), lr=0.1), grown_values="random", drop_fraction=1.0)
    assert method.update()
    assert module.values.any() and not module.values[~module.topology.real()].any()


def test_no_block_ever_moves():
    layer = sk.SparseLinear(8, 12, block_size=(4, 2), blocks=5)
    before = copy.deepcopy(layer.state_dict())
    method = over(layer, sk.Static)
    for _ in range(3):
        layer(torch.ones(1, 8)).sum().backward()
        assert advance(method) is False
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())
    assert method.metrics()["updates"] == 3 and method.metrics()["churn/"] == 0
