"""The batches between two optimizer steps; test_agent.py has the numbers, this what begins and ends a step."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.training.agent import correction as module
from sparsekern.training.agent.correction import Correction
from sparsekern.training.agent.snapshot import ExtraCost, Snapshot
from sparsekern.training.agent.statistics import (
    SAMPLED,
    Products,
    VarianceRatio,
    from_losses,
    from_products,
    inner,
)
from sparsekern.training.distributed import Ranks


def make():
    """Loss ``w x``: the gradient is x, at the snapshot too; its mean is 1."""
    model = nn.Linear(1, 1, bias=False)
    snapshot = Snapshot(model)
    snapshot.take()
    snapshot.mean["weight"].fill_(1)
    correction = Correction(snapshot, {"weight": ""}, learns=True, cost=ExtraCost())
    correction.weights[""] = 0.5
    return model, correction


def backward(model: nn.Linear, correction: Correction, x: float) -> float:
    def closure() -> torch.Tensor:
        return model(torch.tensor([[x]])).sum()

    correction.subtract(closure, None)
    closure().backward()
    correction.note(None)
    return model.weight.grad.item()


def test_the_mean_is_added_once_a_step():
    model, correction = make()
    assert backward(model, correction, 3.0) == 3 - 0.5 * (3 - 1)
    assert backward(model, correction, 5.0) == 8 - 0.5 * (8 - 1)
    correction.commit()
    assert correction.products.sums.tolist() == [[8 * 7, 7 * 7]]
    correction.begin_step()  # as after a step of the optimizer; the gradients were not zeroed, and add up
    assert backward(model, correction, 3.0) == 4.5 + 3 - 0.5 * (3 - 1)


def test_zeroed_gradients_begin_a_step():
    model, correction = make()
    for how in (lambda: model.zero_grad(set_to_none=True), lambda: model.zero_grad(set_to_none=False)):
        backward(model, correction, 3.0)
        how()
        assert backward(model, correction, 5.0) == 5 - 0.5 * (5 - 1)
        how()


def test_gradients_that_were_clipped_between_batches_still_add_up():
    model, correction = make()
    backward(model, correction, 3.0)
    model.weight.grad.mul_(0.5)
    assert backward(model, correction, 5.0) == 1 + 5 - 0.5 * 5


def test_nothing_is_learnt_from_no_batch():
    _, correction = make()
    correction.commit()
    assert not correction.products.sums.any() and correction.variance.value() == 1


def test_ranks_average_the_same_tensors_whatever_their_batches_used(monkeypatch):
    """A part that took no part in this rank's batch may have done so in another's, which waits for an answer."""
    monkeypatch.setattr(module, "parallel_modules", lambda model: [SimpleNamespace(require_backward_grad_sync=True)])
    asked: list[torch.Size] = []
    monkeypatch.setattr(Ranks, "sum", lambda self, t: asked.append(t.shape) or t)
    model = nn.ModuleList([nn.Linear(2, 1, bias=False), nn.Linear(3, 1, bias=False)])
    snapshot = Snapshot(model)
    snapshot.take()
    groups = {"0.weight": "", "1.weight": ""}
    correction = Correction(snapshot, groups, learns=True, cost=ExtraCost())
    for part in (1, 0):

        def closure(part: nn.Module = model[part]) -> torch.Tensor:
            return part(torch.ones(1, part.in_features)).sum()

        asked.clear()
        model.zero_grad()
        correction.subtract(closure, None)
        closure().backward()
        correction.note(None)
        assert asked[1:] == [(1, 2), (1, 3)]


CPU = torch.device("cpu")


def test_every_nth_element_of_all_is_taken_once():
    ratio = VarianceRatio({"a": 5000, "b": 3, "c": 9000}, CPU)
    whole = torch.arange(14003.0)
    a, b, c = whole.split([5000, 3, 9000])
    sample = torch.cat([ratio.sample("a", a), ratio.sample("b", b), ratio.sample("c", c.view(90, 100))])
    assert torch.equal(sample, whole[:: ratio.stride]) and ratio.stride % 2 == 1 and len(sample) <= SAMPLED
    assert torch.equal(ratio.sample("c", None), torch.zeros_like(ratio.sample("c", c)))


def test_a_known_ratio_whose_mean_drifts():
    ratio, generator = VarianceRatio({"a": 100}, CPU), torch.Generator().manual_seed(0)
    assert ratio.value() == 1
    for step in range(300):
        mean = torch.full((100,), 0.01 * step)
        ratio.add(mean + 0.5 * torch.randn(100, generator=generator), mean + torch.randn(100, generator=generator))
    assert ratio.value() == pytest.approx(0.25, rel=0.03)
    state = ratio.state_dict()
    ratio.restart()
    assert ratio.value() == pytest.approx(0.25, rel=0.03)  # until two more steps say otherwise
    ratio.load_state_dict(state)
    ratio.add(torch.ones(100) * torch.inf, torch.ones(100))
    assert ratio.value() == pytest.approx(0.25, rel=0.03)


def test_a_step_without_predecessor_says_nothing():
    ratio = VarianceRatio({"a": 4}, CPU)
    ratio.add(torch.zeros(4), torch.zeros(4))
    ratio.skip()
    ratio.add(torch.ones(4) * 9, torch.ones(4))
    assert ratio.value() == 1
    ratio.add(torch.ones(4) * 9 + 2, torch.ones(4) + 1)
    assert ratio.value() == 4


def test_losses_that_are_the_same_give_one_and_unrelated_ones_about_zero():
    draw = np.random.default_rng(0)
    a, b = draw.random(2000) + 1, draw.random(2000) + 1
    ones = [1.0] * 2000
    assert from_losses(a.tolist(), a.tolist(), ones) == pytest.approx(1)
    assert from_losses(a.tolist(), b.tolist(), ones) < 0.05
    mixed = (0.4 * a + b).tolist()
    covariance = np.cov(mixed, a, ddof=1)
    assert from_losses(mixed, a.tolist(), ones) == pytest.approx(covariance[0, 1] / covariance[1, 1], rel=1e-12)


def test_a_weight_is_a_batch_so_many_times():
    new, old = [1.0, 4.0, 2.0], [2.0, 3.0, 5.0]
    assert from_losses(new, old, [2.0, 1.0, 1.0]) == pytest.approx(from_losses([1.0, *new], [2.0, *old], [1.0] * 4))


def test_it_lies_between_zero_and_one():
    assert from_losses([1.0, 2.0], [2.0, 1.0], [1.0, 1.0]) == 0
    assert from_losses([1.0, 9.0], [1.0, 2.0], [1.0, 1.0]) == 1
    assert from_products(-1.0, 2.0) == 0 and from_products(3.0, 2.0) == 1 and from_products(1.0, 4.0) == 0.25


@pytest.mark.parametrize(
    ("new", "old"),
    [
        ([], []),
        ([1.0], [2.0]),
        ([1.0, 2.0], [3.0, 3.0]),
        ([1.0, 2.0], [3.0, 3.0 + 1e-7]),  # rounding
        ([1.0, math.nan], [1.0, 2.0]),
        ([1.0, 2.0], [math.inf, 2.0]),
    ],
)
def test_losses_that_say_nothing(new, old):
    assert from_losses(new, old, [1.0] * len(new)) is None


def test_smoothing():
    model = nn.Linear(1, 1)
    agent = sk.AGENT(model, torch.optim.SGD(model.parameters(), lr=0.1), alpha=0.3)
    agent.c = {"": 0.2}
    agent._smooth([None])
    assert agent.c == {"": 0.2}
    agent._smooth([1.0])
    assert agent.c == {"": pytest.approx(0.7 * 0.2 + 0.3)}


def test_products_add_up_and_one_that_overflowed_does_not_count():
    products = Products(2, torch.device("cpu"))
    products.add(torch.tensor([[1.0, 4.0], [0.0, 0.0]]))
    products.add(torch.tensor([[1.0, torch.inf], [1.0, 1.0]]))
    products.add(torch.tensor([[2.0, 4.0], [0.0, 0.0]]))
    assert products.estimates() == [3 / 8, None] and products.estimates() == [None, None]
    assert from_products(math.nan, 1.0) is None


def test_an_inner_product_of_half_precision_does_not_overflow():
    a = torch.full((100,), 300.0, dtype=torch.float16)
    assert inner(a, a) == 9e6 and inner(a, a).dtype == torch.float64
