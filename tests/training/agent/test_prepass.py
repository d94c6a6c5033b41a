"""The pass over batches: means and losses against plain sums."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.training.agent.extra import ExtraCost
from sparsekern.training.agent.prepass import _rows, pass_over
from sparsekern.training.agent.snapshot import Snapshot

F64 = torch.float64


def parts():
    torch.manual_seed(0)
    model = sk.sparsify_(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)), 0.5, 4, seed=0).to(F64)
    data = [torch.randn(rows, 8, dtype=F64) for rows in (6, 6, 2)]
    return model, Snapshot(model, None), data, lambda x: model(x).square().mean()


def run(model, snapshot, data, loss, scaler=None):
    return pass_over(model, snapshot, data, loss, scaler=scaler, cost=ExtraCost(), group=None)


@pytest.mark.parametrize("scaled", [False, True])
def test_the_mean_is_that_of_all_rows_whatever_the_batches(scaled):
    model, snapshot, data, loss = parts()
    loss(torch.cat(data)).backward()
    full = {name: p.grad for name, p in model.named_parameters()}
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0) if scaled else None
    assert run(model, snapshot, [*data, data[0] * torch.inf] if scaled else data, loss, scaler) == ([], [], [])
    for name, p in model.named_parameters():
        torch.testing.assert_close(snapshot.mean[name], full[name])
        assert p.grad is full[name]


def test_losses_of_both_weights_and_sizes():
    model, snapshot, data, loss = parts()
    snapshot.take()
    old = [loss(x).item() for x in data]
    with torch.no_grad():
        model[0].values.mul_(1.5)
    new = [loss(x).item() for x in data]
    scaler = torch.amp.GradScaler("cpu")
    found = run(model, snapshot, [data[0] * torch.inf, *data], loss, scaler)  # the first does not count
    assert found.sizes == [6, 6, 2]
    assert found.new == pytest.approx(new, rel=1e-12) and found.old == pytest.approx(old, rel=1e-12)


def test_no_batches():
    model, snapshot, _, loss = parts()
    with pytest.raises(ValueError, match="batches is empty; give some of the training set"):
        run(model, snapshot, [], loss)


def test_rows_of_batches():
    x = torch.zeros(5, 2)
    for batch in (x, (x, 1), [1, x], {"a": "text", "b": x}, [[], {"x": [x]}]):
        assert _rows(batch) == 5
    for batch in (torch.zeros(()), 7, [], "text"):
        assert _rows(batch) == 1


def test_where_every_batch_overflows_the_mean_is_not_known():
    """Not zero: the correction would be the whole gradient of the snapshot."""
    model, snapshot, data, loss = parts()
    scaler = torch.amp.GradScaler("cpu")
    assert run(model, snapshot, [x * torch.inf for x in data], loss, scaler) == ([], [], [])
    assert all(mean.isnan().all() for mean in snapshot.mean.values())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    agent = sk.AGENT(model, optimizer, estimate="gradients", gamma=1.0)
    agent.refresh([x * torch.inf for x in data], loss, scaler=scaler)
    agent.backward(lambda: loss(data[0]), scaler=scaler)
    optimizer.step()
    assert not agent.state_dict()["ready"] and not agent.state_dict()["products"].any()
