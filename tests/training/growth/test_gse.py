"""GSE: its samplers, its choices on hand-worked grids, and its limits RigL and SET."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.topology import Grid, conv_grid, dense_block_norms, generator_for
from sparsekern.training.growth.gse import DISTRIBUTIONS, weights
from tests.topology.test_sampling import chi_square_quantile
from tests.training.grids import MASK, advance, ask_for, changed, grid_layer, over, places

F64 = torch.float64


def grow(candidates: list[int], fraction: float):
    """Return which slots move where, the drawn places being given."""
    module = grid_layer(capacity=7)
    method = over(module, sk.GSE, update_every=2, drop_fraction=lambda step: fraction)
    method.prepare = lambda stage: method._keys.update({"": torch.tensor(candidates, dtype=torch.int32)})
    ask_for(module)
    assert not advance(method)
    ask_for(module)
    slots = changed(module, lambda: advance(method))
    return slots, places(module, slots)


#   norms                   scores of the gradient's blocks      candidates (x)
#     9  .  1  .              1  6  9  2                            .  .  .  x      2 at (0, 3), key 3
#     .  2  .  .              0  8  3  4                            x  .  x  .      0 at (1, 0), 4;  3 at (1, 2), 6
#     .  .  .  8              5  1  7  9                            x  .  .  .      5 at (2, 0), 8
#     3  .  .  4              2  3  6  1                            .  x  .  .      3 at (3, 1), 13


@pytest.mark.parametrize(
    ("fraction", "slots", "grown"),
    [
        (0.16, [], []),
        (0.17, [1], [(2, 0)]),
        (0.34, [1, 2], [(1, 2), (2, 0)]),  # a tie of two 3: the first place
        (0.5, [1, 2, 4], [(1, 2), (2, 0), (3, 1)]),
        (1.0, [1, 2, 3, 4, 5], [(0, 3), (1, 0), (1, 2), (2, 0), (3, 1)]),  # k = |S| = 5 of 6
    ],
)
def test_the_weakest_go_to_the_best_candidates(fraction, slots, grown):
    moved, there = grow([3, 4, 6, 8, 13], fraction)
    assert moved == slots and sorted(there) == grown


def test_no_candidates_no_moves():
    assert grow([], 0.5) == ([], [])


def run(module, method, steps: int, tokens: int = 9, seed: int = 0) -> list[torch.Tensor]:
    """Train without learning; return the dense gradient of every step."""
    gradients = []
    for step in range(steps):
        generator = generator_for(seed, step)
        x = torch.randn(tokens, module.grid.in_features, dtype=F64, generator=generator)
        dy = torch.randn(tokens, module.grid.out_features, dtype=F64, generator=generator)
        module(x).backward(dy)
        advance(method)
        gradients.append(dy.T @ x)
    return gradients


def build(kind=sk.GSE, block=(4, 2), sparsity: float = 0.8, blocks: int | None = None, **options):
    module = sk.SparseLinear(23, 38, sparsity=sparsity, blocks=blocks, block_size=block, seed=0, dtype=F64)
    return module, over(module, kind, **({"update_every": 2, "drop_fraction": lambda step: 0.3} | options))


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("block", [(4, 2), (1, 1)])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_with_all_empty_places_it_is_rigl(distribution, block, scope):
    """With one update no block is far from what the weights reach: 'grabo' and 'graest' draw until all are found."""
    guided, method = build(block=block, subset_factor=100, distribution=distribution, scope=scope)
    exact, reference = build(sk.RigL, block=block, allow_dense_scores=True, scope=scope)
    before = guided.topology.keys().clone()
    run(guided, method, 2)
    run(exact, reference, 2)
    if distribution == "uniform":
        assert torch.equal(guided.topology.keys(), exact.topology.keys())
    else:
        missed = guided.grid.cells - before.numel() - method._keys[""].numel()
        new = ~torch.isin(exact.topology.keys(), before)
        agree = torch.isin(guided.topology.keys(), exact.topology.keys()[new]).sum()
        assert agree >= new.sum() - missed and missed < 0.2 * guided.grid.cells
    assert not torch.equal(before, guided.topology.keys())


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_with_no_choice_it_is_set(distribution):
    """As many candidates as are grown: all of them are, and the same blocks as in SET are dropped."""
    module, method = build(subset_factor=0.3, distribution=distribution, drop_fraction=lambda step: 0.3)
    blocks = module.topology.blocks()
    count = math.ceil(0.3 * blocks)
    before = module.topology.keys().clone()
    run(module, method, 2)
    moved = module.topology.keys() != before
    grown = set(module.topology.keys()[moved].tolist())
    assert len(grown) == int(0.3 * blocks) and grown <= set(method._keys[""].tolist())
    assert method._keys[""].numel() == count
    other, reference = build(sk.SET)
    run(other, reference, 2)
    assert torch.equal(moved, other.topology.keys() != before)


@pytest.mark.parametrize("block", [(4, 2), (1, 1)])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_scores_are_the_norms_of_the_dense_gradients_blocks(distribution, block, monkeypatch):
    module, method = build(block=block, distribution=distribution)
    kept = {}
    monkeypatch.setattr(method, "_clear_scores", lambda: kept.update(method._offers))
    gradient = run(module, method, 2)[-1]
    offer = kept[""]
    expected = dense_block_norms(module.grid, gradient).flatten()[offer.keys]
    torch.testing.assert_close(offer.scores, expected)
    assert offer.keys.numel() == math.ceil(len(module.row)) and (offer.keys.diff() > 0).all()


def test_uniform_candidates_are_equally_likely():
    """Chi-square on inclusion counts: without replacement 3 of 10, so the counts vary by less than a Poisson's."""
    module = grid_layer(capacity=7)
    method = over(module, sk.GSE, subset_factor=0.5)
    draws, counts = 4000, torch.zeros(16)
    for step in range(draws):
        method.steps = step
        method.prepare(0)
        counts[method._keys[""]] += 1
    counts, present = counts.view(4, 4), MASK.bool()
    assert not counts[present].any()
    expected = draws * 0.3
    statistic = float(((counts[~present] - expected) ** 2).sum()) / (expected * (1 - 3 / 10)) * (9 / 10)
    assert statistic < chi_square_quantile(9)


def test_with_replacement_the_wasted_draws_are_not_made_up_for():
    """gse.md 2.6e: of |A| draws about |A| (1 - d)(1 - exp(-d)) / d are distinct and empty."""
    module, method = build(block=(1, 1), sparsity=0.8, with_replacement=True)
    blocks, cells = module.topology.blocks(), module.grid.cells
    sizes = []
    for step in range(50):
        method.steps = step
        method.prepare(0)
        keys = method._keys[""]
        assert not torch.isin(keys, module.topology.keys()).any() and (keys.diff() > 0).all()
        sizes.append(keys.numel())
    density = blocks / cells
    expected = blocks * (1 - density) * (1 - math.exp(-density)) / density
    assert abs(sum(sizes) / 50 - expected) < 0.02 * blocks


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(("blocks", "all_of_them"), [(436, False), (437, True), (600, True)])
def test_of_a_layer_that_is_half_full_all_empty_places_are_candidates(blocks, all_of_them, distribution):
    """gse.md 2.6d: as in the authors' code. Of 874 places; drawn with replacement some are missed, without none."""
    module, method = build(
        block=(1, 1), blocks=blocks, with_replacement=True, distribution=distribution, update_every=2
    )
    run(module, method, 1)
    keys = method._keys[""]
    present = module.topology.keys()
    absent = torch.tensor([key for key in range(874) if key not in set(present.tolist())], dtype=torch.int32)
    assert torch.equal(keys, absent) == all_of_them and torch.isin(keys, absent).all()


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("distribution", ["grabo", "graest"])
def test_guided_candidates_follow_the_joint_distribution(distribution, replacement):
    """The very weights of one batch, drawn from again and again: with replacement the first draws, else one a time."""
    module, method = build(block=(8, 6), distribution=distribution, with_replacement=replacement, blocks=3)
    method.subset_factor = 1 / 3
    generator = generator_for(5)
    x, dy = (torch.randn(6, n, dtype=F64, generator=generator) for n in (23, 38))
    x[:, :6] *= 4
    module(x).backward(dy)
    sums = module.probe.tensor.grad
    rows, cols = weights(module.grid, distribution, sums)
    joint = (rows[:, None] * cols).flatten()
    joint[module.topology.keys().long()] = 0
    draws, counts = 6000, torch.zeros(module.grid.cells)
    for step in range(draws):
        method.steps = step
        counts[method._draw("", module, (rows, cols))] += 1
    assert not counts[joint == 0].any()
    expected = counts.sum() * joint / joint.sum()  # given that a draw is not wasted
    some = joint > 0
    statistic = float(((counts - expected)[some] ** 2 / expected[some]).sum())
    assert statistic < chi_square_quantile(int(some.sum()) - 1)


def test_weights_by_hand():
    grid = Grid(3, 2, (2, 1))
    squares = torch.tensor([9.0, 16, 4, 25])  # rows {0, 1}, {2}; columns 0, 1
    assert [w.tolist() for w in weights(grid, "grabo", squares)] == [[3, 4], [[2, 5]]]
    sums = torch.tensor([3.0, -4, -2, -7, 1])
    assert [w.tolist() for w in weights(grid, "graest", sums)] == [[5, 2], [[7, 1]]]
    assert [w.tolist() for w in weights(Grid(3, 2, (1, 1)), "grabo", sums.abs())] == [[3, 4, 2], [[7, 1]]]
    assert [w.tolist() for w in weights(Grid(3, 2, (1, 1)), "graest", sums)] == [[3, 4, 2], [[7, 1]]]


def test_weights_of_a_convolution_by_hand():
    """Six output and six input channels in two groups, two taps; blocks of 2 x 2 stick out of every group and tap."""
    grid = conv_grid(6, 6, (1, 2), (2, 2), groups=2)
    out = torch.tensor([3.0, 4, 5, 8, 6, 0])  # group 0: {3, 4}, {5}; group 1: {8, 6}, {0}
    into = torch.tensor([0.0, 5, 2, 4, 3, 1, 6, 8, 9, 0, 0, 7])  # a tap in three: {0, 5}, {2}; {4, 3}, {1}; ...
    rows, cols = weights(grid, "graest", torch.cat([out, into]))
    assert rows.tolist() == [5, 5, 10, 0]
    assert cols.tolist() == [[5, 2, 5, 1], [10, 9, 0, 7]]
    squares = torch.cat([rows.square(), cols.flatten().square()])
    for found, expected in zip(weights(grid, "grabo", squares), (rows, cols), strict=True):
        assert torch.equal(found, expected)


def test_candidates_that_somebody_else_filled_are_left_out():
    module, method = build(subset_factor=100)
    run(module, method, 1)
    key = int(method._keys[""][0])
    move = [torch.tensor([n], dtype=torch.int32) for n in (0, *divmod(key, module.grid.cols))]
    module.move_(*move)
    run(module, method, 1)
    module.topology.validate()
    assert method.updates == 1


def test_resumed_between_backwards_after_a_larger_subset():
    """The probe is as wide as the largest subset so far; the run that goes on has seen none."""

    def build() -> tuple[nn.Module, torch.optim.Optimizer, sk.GSE]:
        model = sk.sparsify_(nn.Sequential(nn.Linear(64, 64)), 0.75, 8, seed=1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return model, optimizer, sk.GSE(model, optimizer, update_every=2, with_replacement=True, drop_fraction=0.5)

    def go_on(model: nn.Module, optimizer: torch.optim.Optimizer, sparse: sk.GSE, x: torch.Tensor) -> None:
        model(x).square().mean().backward()
        advance(sparse)

    data = torch.randn(40, 8, 64, generator=generator_for(0))
    first = build()
    for at in range(39):
        first[0](data[at]).square().mean().backward()
        keys, probes = first[2].state_dict()["probes"]
        heard = probes["heard"]
        if heard and heard["0"].shape[0] > keys["0"].shape[0]:
            break
        go_on(*first[:3], data[at])
    else:
        raise AssertionError("no smaller subset came")
    second = build()
    saved = copy.deepcopy([part.state_dict() for part in first])
    for part, state in zip(second, saved, strict=True):
        part.load_state_dict(state)
    second[0][0].values.grad, second[0][0].bias.grad = (p.grad.clone() for p in (first[0][0].values, first[0][0].bias))
    for run in (first, second):
        go_on(*run, data[39])
    assert torch.equal(first[0][0].topology.keys(), second[0][0].topology.keys())
    assert torch.equal(first[0][0].values, second[0][0].values)
