"""RigL on hand-worked 4x4 grids, and against the dense gradient."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.topology import Grid, dense_block_norms, generator_for
from sparsekern.training import METHODS
from sparsekern.training.distributed import Ranks
from tests.training.grids import MASK, SCORES, advance, ask_for, changed, grid_layer, over, places


def rigl(module: sk.SparseLinear, **options) -> sk.RigL:
    return over(module, sk.RigL, **options)


def move(fraction: float, block: int = 2, scores: torch.Tensor = SCORES, **options):
    module = grid_layer(block, capacity=7)
    method = rigl(module, drop_fraction=lambda step: fraction, **options)
    ask_for(module, scores)
    slots = changed(module, lambda: advance(method))
    return slots, places(module, slots)


#   The best of the ten empty places: 7 at (2, 2); 6 at (0, 1) and (3, 2); 5 at (2, 0); 4 at (1, 3); 3 at (1, 2), (3, 1)


@pytest.mark.parametrize(
    ("fraction", "slots", "grown"),
    [
        (0.16, [], []),
        (0.17, [1], [(2, 2)]),
        (0.34, [1, 2], [(0, 1), (2, 2)]),  # a tie of two 6: the first place
        (0.5, [1, 2, 4], [(0, 1), (2, 2), (3, 2)]),
        (1.0, [0, 1, 2, 3, 4, 5], [(3, 2), (0, 1), (1, 2), (2, 2), (1, 3), (2, 0)]),  # 3: the first of two
    ],
)
def test_the_weakest_go_where_the_gradient_is_largest(fraction, slots, grown):
    moved, there = move(fraction)
    assert moved == slots and sorted(there) == sorted(grown)


def test_unstructured_weights_are_the_same_table():
    assert sorted(move(0.5, block=1, allow_dense_scores=True)[1]) == [(0, 1), (2, 2), (3, 2)]


def test_regrow():
    """Dropped are 1, 2, 3 at (0, 2), (1, 1), (3, 0), with 9, 8, 2; the best three of these and the empty: 9, 8, 7."""
    assert move(0.5, regrow=True) == ([4], [(2, 2)])


def test_regrown_blocks_stay_as_they_are():
    module = grid_layer()
    method = rigl(module, regrow=True)
    ask_for(module)
    before = module.values.detach().clone()
    advance(method)
    assert torch.equal(before[[0, 1, 2, 3, 5]], module.values.detach()[[0, 1, 2, 3, 5]])


def test_nothing_moves_without_a_gradient():
    assert move(0.5, scores=torch.zeros(4, 4)) == ([], [])


def test_no_more_than_the_empty_places():
    module = sk.SparseLinear(8, 8, block_size=2, blocks=15, seed=0)
    method = rigl(module, drop_fraction=1.0)
    ask_for(module, SCORES + 1)
    assert advance(method) and method.metrics()["churn/"] == 1 / 15


def test_min_age_and_keep_connected_spare_blocks():
    # row 1 and column 1 have only slot 2, column 2 only slot 1; see test_set.py: only slot 4 may go
    assert move(1.0, keep_connected=True)[0] == [4]
    module = grid_layer(capacity=7)
    method = rigl(module, drop_fraction=lambda step: 0.34, min_age=1)
    dropped = []
    for at in range(4):
        ask_for(module, torch.rand(4, 4, generator=generator_for(at)) + 1)
        dropped.append(changed(module, lambda: advance(method)))
    # 1 and 2 are the weakest; they are spared once, when 3 and 4 go, then go again, being zero
    assert dropped == [[1, 2], [4, 5], [1, 2], [4, 5]]


def dense_choice(module: sk.SparseLinear, x: torch.Tensor, dy: torch.Tensor, count: int) -> set[int]:
    """Return the keys of the empty places with the largest blocks of the dense gradient."""
    norms = dense_block_norms(module.grid, dy.T @ x).flatten()
    norms[module.topology.sorted_keys().long()] = -1
    return set(norms.topk(count).indices.tolist())


CASES = {
    "exact": ((4, 2), {}),
    "all shortlisted": ((4, 2), {"scoring": "screen", "shortlist": 1000}),
    "unstructured": ((1, 1), {"allow_dense_scores": True}),
    "unstructured, screened": ((1, 1), {"allow_dense_scores": True, "scoring": "screen"}),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_rigl_on_the_dense_gradient(case):
    block, options = CASES[case]
    module = sk.SparseLinear(23, 38, sparsity=0.8, block_size=block, seed=0, dtype=torch.float64)
    method = rigl(module, update_every=2, drop_fraction=lambda step: 0.3, **options)
    for step in range(2):
        x = torch.randn(9, 23, dtype=torch.float64, generator=generator_for(step))
        dy = torch.randn(9, 38, dtype=torch.float64, generator=generator_for(step + 10))
        module(x).backward(dy)
        before = set(module.topology.keys().tolist())
        expected = dense_choice(module, x, dy, int(0.3 * module.topology.blocks()))
        assert advance(method) == (step == 1)
    assert set(module.topology.keys().tolist()) - before == expected and len(expected) > 4


def test_screening_finds_most_of_the_best():
    """Not all: the estimate of a norm from 16 sketches deviates by about a third."""
    module = sk.SparseLinear(96, 96, sparsity=0.9, block_size=4, seed=0, dtype=torch.float64)
    method = rigl(module, update_every=2, drop_fraction=lambda step: 0.3, scoring="screen", allow_dense_scores=True)
    x, dy = (torch.randn(5, 96, dtype=torch.float64, generator=generator_for(s)) for s in range(2))
    before = set(module.topology.keys().tolist())
    expected = dense_choice(module, x, dy, 17)
    for _ in range(2):
        module(x).backward(dy)
        advance(method)
    grown = set(module.topology.keys().tolist()) - before
    assert len(grown) == 17 and len(grown & expected) >= 12  # by chance it would be one


def test_screening_does_not_look_at_places_that_hold_a_block():
    """Where the gradient is by far the largest."""
    module = grid_layer(capacity=7)
    method = rigl(module, update_every=2, drop_fraction=lambda step: 0.5, scoring="screen", shortlist=1)
    before = set(module.topology.keys().tolist())
    for _ in range(2):
        ask_for(module, torch.where(MASK > 0, 1000.0, SCORES))
        moved = advance(method)
    assert moved and len(set(module.topology.keys().tolist()) - before) == 3


def test_screening_estimates_norms_and_not_sums():
    """Blocks of changing signs have norm 8, those of one sign 4: their sums would be 0 and 32."""
    module = sk.SparseLinear(64, 64, sparsity=0.9, block_size=8, seed=0)
    method = rigl(module, update_every=2, drop_fraction=lambda step: 1.0, scoring="screen", shortlist=1)
    rows, cols = torch.arange(64)[:, None], torch.arange(64)
    one_sign = (rows // 8 + cols // 8) % 2 == 0
    gradient = torch.where(one_sign, 0.5, (-1.0) ** (rows + cols))
    before = module.topology.keys().clone()
    for _ in range(2):
        module(torch.eye(64)).backward(gradient.T.contiguous())
        advance(method)
    grown = module.topology.keys()[~torch.isin(module.topology.keys(), before)]
    assert grown.numel() == 6 and not one_sign[grown // 8 * 8, grown % 8 * 8].any()


def test_the_sketch_is_unbiased_and_deviates_as_it_should():
    """The mean of the squares of r sketches: for signs, variance (2 |G|^4 - ...) / r, at most 8 |G|^4 / r."""
    grid = Grid(16, 16, (8, 8))
    generator = generator_for(0)
    dy, x = (torch.randn(4, 16, dtype=torch.float64, generator=generator) for _ in range(2))
    exact = dense_block_norms(grid, dy.T @ x).square()
    pairs, repeats = 16, 400
    u, v = (torch.randint(2, (pairs * repeats, 16), generator=generator).double() * 2 - 1 for _ in range(2))
    answers = sk.ops.sketch(dy, x, u, v, 8, 8, "eager").view(repeats, pairs, 2, 2)
    estimates = answers.square().mean(1) / exact
    bound = (8 / pairs) ** 0.5
    assert ((estimates.mean(0) - 1).abs() < 5 * bound / repeats**0.5).all()
    assert (estimates.std(0) < 1.1 * bound).all() and (estimates.std(0) > 0.3 * bound).all()


def test_several_backwards_a_step_are_noticed(caplog):
    """Norms of two micro-batches do not add up to the norm of their sum."""
    module = sk.SparseLinear(8, 8, block_size=2, blocks=6, seed=0)
    method = rigl(module, update_every=3)
    moved = []
    for _ in range(7):
        for _ in range(2):
            ask_for(module)
        with caplog.at_level(logging.WARNING, "sparsekern"):
            moved.append(advance(method))
    assert moved == [False] * 4 + [True, False, True], "the first is two steps late, the second one"
    assert caplog.text.count("the gradient of '' comes in 2 parts a step (several batches") == 1
    assert method.state_dict()["screen"] is True


def test_a_backward_that_creates_a_graph_is_one(caplog):
    module = sk.SparseLinear(8, 8, block_size=2, blocks=6, seed=0)
    method = rigl(module)
    with pytest.warns(UserWarning, match="create_graph"):
        module(torch.ones(1, 8)).square().sum().backward(create_graph=True)
    assert advance(method) is True and not caplog.text


def test_skip_step_leaves_the_weights_of_an_update_alone():
    model = nn.Sequential(sk.SparseLinear(8, 8, block_size=2, blocks=6, seed=0), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    method = sk.RigL(model, optimizer, update_every=3, skip_step=True)
    changed = []
    for step in range(6):
        model(torch.randn(4, 8, generator=generator_for(step))).square().sum().backward()
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        changed.append([not torch.equal(b, p) for b, p in zip(before, model.parameters(), strict=True)])
        assert method.step() == (step % 3 == 2)
        optimizer.zero_grad()
    assert changed == [[True] * 4, [True] * 4, [False] * 4] * 2
    assert method.steps == 6


def test_score_tokens_scores_on_a_slice():
    # Tokens 0 and 4 of 8 are the first features of block columns 0 and 2, where there are 5 at (2, 0) and 7 at (2, 2).
    assert move(0.17, score_tokens=2) == ([1], [(2, 2)])


@pytest.mark.parametrize(
    ("block", "sparsity", "sketches", "used"),
    [(8, 0.9, 16, 6), (16, 0.95, 16, 12), (16, 0.95, 8, 8), (16, 0.9, 16, 16)],
)
def test_fewer_sketches_where_more_would_not_be_fewer_than_values(block, sparsity, sketches, used, caplog):
    module = sk.SparseLinear(32 * block, 32 * block, block_size=block, sparsity=sparsity, seed=0)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    for name, allow in (("first", False), ("second", True)):
        method = sk.RigL(
            module, optimizer, scoring="screen", sketches=sketches, update_every=1, allow_dense_scores=allow, seed=1
        )
        assert module.probe.tensor.shape == (sketches if allow else used, 32, 32), name
        assert module.probe.tensor.numel() < module.values.numel() or allow
        method._disarm()
    assert caplog.text.count(f"by {used} sketches a block") == (used < sketches)


class TestErrors:
    def test_unstructured_weights_need_consent(self):
        module = grid_layer(1)
        with pytest.raises(ValueError, match=r"has 1x1 blocks.*4 x 4 matrix.*Use GSE.*allow_dense_scores=True"):
            METHODS["rigl"](module, torch.optim.SGD(module.parameters()))

    @pytest.mark.parametrize(
        ("block", "sparsity", "options", "text"),
        [
            (2, 0.75, {}, "'' has 2x2 blocks, for each of which RigL would hold a norm: 1024 norms.* 1024 values.*GSE"),
            (4, 0.95, {}, "would hold a norm.*allow_dense_scores=True"),
            (4, 0.8, {"scoring": "screen"}, "would hold 4 numbers: 4096 of them, and the layer has 3280 values"),
            (4, 0.95, {"scoring": "screen", "sketches": 1}, "would hold 1 numbers"),
        ],
    )
    def test_more_scores_than_values_need_consent(self, block, sparsity, options, text):
        module = sk.SparseLinear(32 * block, 32 * block, block_size=block, sparsity=sparsity, seed=0)
        with pytest.raises(ValueError, match=text):
            rigl(module, **options)
        with pytest.raises(ValueError, match="for each of which GraNet would hold"):
            over(module, sk.GraNet, final_sparsity=0.97, stop=9, **options)
        assert module.probe is None
        rigl(module, allow_dense_scores=True, **options)

    def test_screening_that_turns_out_to_be_needed_asks_for_consent(self):
        module = sk.SparseLinear(128, 128, block_size=4, sparsity=0.8, seed=0)
        before = module.topology.keys().clone()
        method = rigl(module)
        for _ in range(2):
            module(torch.ones(1, 128)).sum().backward()
        with pytest.raises(ValueError, match="would hold 4 numbers.*allow_dense_scores=True"):
            advance(method)
        assert method.updates == 0 and method.stages() == 1 and torch.equal(module.topology.keys(), before)

    def test_exact_scores_of_several_backwards(self):
        module = grid_layer()
        method = rigl(module, scoring="exact")
        for _ in range(2):
            ask_for(module)
        with pytest.raises(ValueError, match="scoring is 'exact', but the gradient of '' comes in 2 parts"):
            advance(method)

    def test_exact_scores_on_several_ranks(self, monkeypatch):
        monkeypatch.setattr(Ranks, "count", 2)
        monkeypatch.setattr(Ranks, "check_agreement", lambda *args: None)
        module = grid_layer()
        with pytest.raises(ValueError, match="norms do not add up over ranks; use 'auto' or 'screen'"):
            sk.RigL(module, torch.optim.SGD(module.parameters()), scoring="exact")
        assert sk.RigL(module, torch.optim.SGD(module.parameters())).stages() == 2
