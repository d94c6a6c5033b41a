"""The batches between two optimizer steps; test_agent.py has the numbers, this what begins and ends a step."""

from __future__ import annotations

import torch
from torch import nn

from sparsekern.training.correction import Correction
from sparsekern.training.extra import ExtraCost
from sparsekern.training.snapshot import Snapshot


def make():
    """Loss ``w x``: the gradient is x, at the snapshot too; its mean is 1."""
    model = nn.Linear(1, 1, bias=False)
    snapshot = Snapshot(model, None)
    snapshot.take()
    snapshot.mean["weight"].fill_(1)
    correction = Correction(model, snapshot, {"weight": ""}, learns=True, cost=ExtraCost(), process_group=None)
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
