"""The batches between two optimizer steps; test_agent.py has the numbers, this what begins and ends a step."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from sparsekern.training.agent import correction as module
from sparsekern.training.agent.correction import Correction
from sparsekern.training.agent.extra import ExtraCost
from sparsekern.training.agent.snapshot import Snapshot


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


def test_ranks_average_the_same_tensors_whatever_their_batches_used(monkeypatch):
    """A part that took no part in this rank's batch may have done so in another's, which waits for an answer."""
    monkeypatch.setattr(module, "parallel_modules", lambda model: [SimpleNamespace(require_backward_grad_sync=True)])
    monkeypatch.setattr(module, "ranks", lambda group: 2)
    asked: list[torch.Size] = []
    monkeypatch.setattr(module, "sum_over_ranks", lambda t, group: asked.append(t.shape) or t)
    model = nn.ModuleList([nn.Linear(2, 1, bias=False), nn.Linear(3, 1, bias=False)])
    snapshot = Snapshot(model, None)
    snapshot.take()
    groups = {"0.weight": "", "1.weight": ""}
    correction = Correction(model, snapshot, groups, learns=True, cost=ExtraCost(), process_group=None)
    for part in (1, 0):

        def closure(part: nn.Module = model[part]) -> torch.Tensor:
            return part(torch.ones(1, part.in_features)).sum()

        asked.clear()
        model.zero_grad()
        correction.subtract(closure, None)
        closure().backward()
        correction.note(None)
        assert asked[1:] == [(1, 2), (1, 3)]
