"""Steps of the probabilities, by hand."""

from __future__ import annotations

import itertools

import pytest
import torch

import sparsekern as sk
from sparsekern.topology import generator_for
from sparsekern.training.distributed import Ranks
from sparsekern.training.vrpge import masks as module
from sparsekern.training.vrpge.budget import Budget, Candidates, top_units
from sparsekern.training.vrpge.masks import Probabilities, draw_masks, score_gradient
from tests.memory import allocations


def make(rate=0.1, optimizer="sgd", clip=None):
    layer = sk.SparseLinear(8, 8, block_size=4, sparsity=0, seed=0)  # 4 units
    budget = Budget({"fc": Candidates(layer, "block")}, 0.5, "global", None, 0.0, "sort")
    return Probabilities(
        budget, torch.device("cpu"), rate=rate, optimizer=optimizer, clip=clip, mean_over_ranks=Ranks().mean
    )


MASKS = torch.tensor([[True, False, True, False], [False, True, True, False]])


def step(s: Probabilities, losses: torch.Tensor, masks: torch.Tensor, factor: float) -> None:
    s.add_losses(losses)
    s.step(masks, factor)


def test_a_step_by_hand():
    s = make()
    assert s.value.tolist() == [0.5] * 4
    # scores: (3 - 2) / 2 / 0.5 = 1 for the first, -1 for the second; 0.5 -+ 0.1 * 1, and the sum is 2 as it was
    step(s, torch.tensor([3.0, 2.0]), MASKS, 1.0)
    torch.testing.assert_close(s.value, torch.tensor([0.4, 0.6, 0.5, 0.5]))
    step(s, torch.tensor([2.0, 2.0]), MASKS, 1.0)
    torch.testing.assert_close(s.value, torch.tensor([0.4, 0.6, 0.5, 0.5]))


def test_losses_of_batches_add_up_and_are_used_once():
    s, once = make(), make()
    for losses in ([1.0, 0.5], [float("inf"), 9.0], [2.0, 1.5]):  # the second overflowed
        s.add_losses(torch.tensor(losses))
    s.step(MASKS, 1.0)
    step(once, torch.tensor([3.0, 2.0]), MASKS, 1.0)
    assert torch.equal(s.value, once.value) and not torch.equal(s.value, make().value)
    s.step(MASKS, 1.0)
    s.add_losses(torch.tensor([9.0, 1.0]))
    s.clear_losses()
    s.step(MASKS, 1.0)
    assert torch.equal(s.value, once.value), "nothing noted, no step"


def test_the_rate_has_a_factor_and_scores_are_clipped():
    s = make()
    step(s, torch.tensor([3.0, 2.0]), MASKS, 0.5)
    torch.testing.assert_close(s.value, torch.tensor([0.45, 0.55, 0.5, 0.5]))
    s = make(clip=0.1)
    step(s, torch.tensor([3.0, 2.0]), MASKS, 1.0)  # (1, -1) becomes (1, -1) * 0.1 / sqrt(2)
    torch.testing.assert_close(s.value[0], torch.tensor(0.5 - 0.01 / 2**0.5))


def test_the_budget_holds_after_any_number_of_steps():
    s = make(rate=0.3, optimizer="adam")
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        masks = torch.rand(2, 4, generator=generator) < s.value
        step(s, torch.randn(2, generator=generator), masks, 1.0)
        assert float(s.value.sum()) <= 2 + 1e-6 and s.value.min() >= 0 and s.value.max() <= 1


def test_a_restart_has_a_probability_and_no_memory():
    s = make(optimizer="adam")
    step(s, torch.tensor([3.0, 2.0]), MASKS, 1.0)
    before = s.value
    s.restart({"fc": torch.tensor([0])}, 0.2)
    torch.testing.assert_close(s.value, torch.tensor([0.2, *before[1:].tolist()]))
    state = s.state_dict()["optimizer"]
    assert state["exp_avg"][0] == 0 and state["exp_avg_sq"][0] == 0 and state["exp_avg"][1] != 0


def test_a_restart_before_the_first_step_keeps_the_budget():
    s = make()
    s.restart({"fc": torch.tensor([1, 2])}, 1.0)
    torch.testing.assert_close(s.value, torch.tensor([0.25, 0.75, 0.75, 0.25]))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"optimizer": "lion"}, "probability_optimizer is 'lion'; it must be one of adam, sgd"),
        ({"rate": 0.0}, "probability_rate is 0.0; it must be above 0"),
        ({"clip": 0.0}, "score_clip is 0.0; it must be above 0, or None for no limit"),
    ],
)
def test_errors(options, text):
    with pytest.raises(ValueError, match=text):
        make(**options)


UNITS = 4
ALL = torch.tensor(list(itertools.product([False, True], repeat=UNITS)))  # (16, 4)
S = torch.tensor([0.1, 0.5, 0.85, 0.3], dtype=torch.float64)
LOSSES = torch.randn(2**UNITS, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3


def likelihoods(s: torch.Tensor) -> torch.Tensor:
    return torch.where(ALL, s, 1 - s).prod(1)


def moments(masks: int, losses: torch.Tensor = LOSSES) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and variance of the estimate over all tuples of masks."""
    p = likelihoods(S)
    mean, square = torch.zeros(UNITS).double(), torch.zeros(UNITS).double()
    for chosen in itertools.product(range(2**UNITS), repeat=masks):
        at = list(chosen)
        estimate = score_gradient(losses[at], ALL[at], S)
        mean += p[at].prod() * estimate
        square += p[at].prod() * estimate.square()
    return mean, square - mean.square()


@pytest.mark.parametrize("masks", [2, 3])
def test_unbiased_for_the_scaled_gradient_of_the_expected_loss(masks):
    s = S.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((likelihoods(s) * LOSSES).sum(), s)
    mean, _ = moments(masks)
    torch.testing.assert_close(mean, (S * (1 - S)).sqrt() * gradient, atol=1e-12, rtol=1e-12)


def test_the_variance_is_at_most_half_the_largest_gap_squared_and_knows_no_offset():
    gap = LOSSES.max() - LOSSES.min()
    _, two = moments(2)
    assert (two <= gap**2 / 2).all()
    _, shifted = moments(2, LOSSES + 1000)
    torch.testing.assert_close(shifted, two, rtol=1e-6, atol=1e-8)
    _, three = moments(3)
    assert (three < two).all()


def test_by_hand():
    # two masks: g = (L1 - L2) / 2 * (m1 - m2) / sqrt(s (1 - s)) = 0.5 / 0.5, -0.5 / 0.4, and 0 where they agree
    masks = torch.tensor([[True, False, True, False], [False, True, True, False]])
    s = torch.tensor([0.5, 0.2, 0.9, 0.0])
    found = score_gradient(torch.tensor([3.0, 2.0]), masks, s)
    torch.testing.assert_close(found, torch.tensor([1.0, -1.25, 0.0, 0.0]))
    assert (found[2:] == 0).all()


def test_exactly_nothing_where_masks_agree_whatever_the_losses():
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(5, 40, generator=generator) < 0.5
    masks[:, :10] = masks[:1, :10]
    found = score_gradient(torch.randn(5, generator=generator) * 1e4, masks, torch.rand(40, generator=generator))
    assert (found[:10] == 0).all() and found.isfinite().all()


def test_counts_of_masks_are_binomial():
    s = torch.tensor([0.0, 0.02, 0.3, 0.5, 0.97, 1.0])
    draws = 20_000
    masks = draw_masks(s, draws, generator_for(0, "masks"))
    assert masks.shape == (draws, 6) and masks.dtype == torch.bool
    counts = masks.sum(0).double()
    assert counts[0] == 0 and counts[-1] == draws
    inner, p = counts[1:-1], s[1:-1].double()
    chi_square = ((inner - draws * p).square() / (draws * p * (1 - p))).sum()
    assert chi_square < 23.5  # four degrees of freedom: exceeded once in 10 000
    both = (masks[:, 2] & masks[:, 3]).double().mean()  # independent of each other
    assert abs(float(both) - 0.15) < 5 * (0.15 * 0.85 / draws) ** 0.5
    again = draw_masks(s, draws, generator_for(0, "masks"))
    assert torch.equal(masks, again)


def test_the_likeliest_within_the_budget_and_ties_go_to_the_first():
    s = torch.tensor([0.3, 0.9, 0.3, 0.3, 0.1])
    assert top_units(s, torch.ones(5), 3.0).tolist() == [True, True, True, False, False]
    assert top_units(s, torch.tensor([1.0, 3, 1, 1, 1]), 4.5).tolist() == [True, True, False, False, False]
    assert top_units(s, torch.full((5,), 0.1, dtype=torch.float64), 0.3).sum() == 3, (
        "0.1 + 0.1 + 0.1 is above 0.3 in floats"
    )


def test_masks_and_scores_are_the_same_however_many_units_are_looked_at_together(monkeypatch):
    likely = torch.rand(100, generator=generator_for(1))
    masks = draw_masks(likely, 3, generator_for(0))
    scores = score_gradient(LOSSES[:3].float(), masks, likely)
    chance = torch.rand(3, 100, generator=generator_for(0))
    assert torch.equal(masks, chance < likely)
    monkeypatch.setattr(module, "CHUNK", 7)
    assert torch.equal(draw_masks(likely, 3, generator_for(0)), masks)
    torch.testing.assert_close(score_gradient(LOSSES[:3].float(), masks, likely), scores)


def test_masks_and_scores_take_what_they_return_and_little_more(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 2**10)
    likely, masks = torch.full((2**17,), 0.5), torch.rand(2, 2**17) < 0.5
    assert allocations(lambda: draw_masks(likely, 2, generator_for(0))).peak < 2.1 * 2**17
    assert allocations(lambda: score_gradient(torch.ones(2), masks, likely)).peak < 4.5 * 2**17
