"""Steps of the probabilities, by hand."""

from __future__ import annotations

import pytest
import torch

import sparsekern as sk
from sparsekern.training.vrpge.budget import Budget
from sparsekern.training.vrpge.candidates import Candidates
from sparsekern.training.vrpge.probabilities import Probabilities


def make(rate=0.1, optimizer="sgd", clip=None):
    layer = sk.SparseLinear(8, 8, block_size=4, sparsity=0, seed=0)  # 4 units
    budget = Budget({"fc": Candidates(layer, "block")}, 0.5, "global", None, 0.0, "sort")
    return Probabilities(budget, torch.device("cpu"), rate=rate, optimizer=optimizer, clip=clip)


MASKS = torch.tensor([[True, False, True, False], [False, True, True, False]])


def step(s: Probabilities, losses: torch.Tensor, masks: torch.Tensor, factor: float) -> None:
    s.note(losses)
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
        s.note(torch.tensor(losses))
    s.step(MASKS, 1.0)
    step(once, torch.tensor([3.0, 2.0]), MASKS, 1.0)
    assert torch.equal(s.value, once.value) and not torch.equal(s.value, make().value)
    s.step(MASKS, 1.0)
    s.note(torch.tensor([9.0, 1.0]))
    s.forget()
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
