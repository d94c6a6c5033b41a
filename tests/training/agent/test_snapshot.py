"""The earlier state that a model can become."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.training.agent import snapshot as module
from sparsekern.training.agent.correction import _rows, pass_over
from sparsekern.training.agent.snapshot import ExtraCost, Snapshot, exchange_


@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (5, 4), (7, 2, 3)])
def test_an_exchange_in_pieces(shape, monkeypatch):
    monkeypatch.setattr(module, "EXCHANGED", 8)
    a, b = torch.randn(shape), torch.randn(shape)
    if len(shape) == 2:
        a = a.t().contiguous().t()  # other strides
    x, y = a.clone(), b.clone()
    exchange_(a, b)
    assert torch.equal(a, y) and torch.equal(b, x)


@pytest.mark.parametrize("block", [1, 4])
def test_the_model_becomes_the_snapshot_on_its_topology_and_back(block):
    torch.manual_seed(0)
    model = sk.sparsify_(nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)), 0.5, block, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = sk.SET(model, optimizer, drop_fraction=0.5)
    snapshot = Snapshot(model, follow=method.follow)
    snapshot.take()
    old, x = copy.deepcopy(model), torch.randn(5, 16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    method.update()
    new, addresses = copy.deepcopy(model), [t.data_ptr() for t in (*model.parameters(), *model.buffers())]
    for _ in range(2):
        with snapshot.swapped():
            assert torch.equal(model(x), old(x)) and torch.equal(model[0].topology.keys(), old[0].topology.keys())
        assert torch.equal(model(x), new(x)) and torch.equal(model[0].topology.keys(), new[0].topology.keys())
        assert not torch.equal(model[0].topology.keys(), old[0].topology.keys())
    with pytest.raises(KeyError), snapshot.swapped():
        raise KeyError
    assert torch.equal(model(x), new(x))
    assert [t.data_ptr() for t in (*model.parameters(), *model.buffers())] == addresses
    moved = model[0].topology.keys() != old[0].topology.keys()
    assert snapshot.zero_moved_("0.values", torch.full_like(model[0].values, torch.nan))[moved].eq(0).all()
    assert snapshot.corrected() < 1
    other = Snapshot(new)
    other.load_state_dict(snapshot.state_dict())
    with other.swapped():
        assert torch.equal(new(x), old(x))
    assert torch.equal(new(x), model(x)) and other.corrected() == snapshot.corrected()
    snapshot.take()
    assert snapshot.corrected() == 1


def test_a_dense_model_and_one_that_does_not_train():
    model = nn.Linear(3, 2)
    snapshot = Snapshot(model)
    assert snapshot.corrected() == 0
    snapshot.take()
    assert snapshot.corrected() == 1 and snapshot.values.keys() == {"weight", "bias"}
    with pytest.raises(ValueError, match="no parameter of the model trains"):
        Snapshot(model.requires_grad_(False))


def test_half_precision_has_a_mean_in_float32():
    snapshot = Snapshot(nn.Linear(3, 2, dtype=torch.bfloat16))
    snapshot.take()
    assert snapshot.values["weight"].dtype == torch.bfloat16 and snapshot.mean["weight"].dtype == torch.float32


def test_an_autocast_around_both_casts_the_weights_of_each():
    """It keeps what it has cast, by the address of the weight, which is the same."""
    model, x = nn.Linear(4, 2), torch.randn(3, 4)
    snapshot = Snapshot(model)
    snapshot.take()
    with torch.no_grad():
        model.weight.neg_()
    with torch.autocast("cpu", torch.bfloat16):
        new = model(x)
        with snapshot.swapped():
            old = model(x)
        again = model(x)
    with torch.autocast("cpu", torch.bfloat16), snapshot.swapped():
        assert torch.equal(old, model(x))
    assert torch.equal(new, again) and not torch.equal(new, old)


F64 = torch.float64


def parts():
    torch.manual_seed(0)
    model = sk.sparsify_(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)), 0.5, 4, seed=0).to(F64)
    data = [torch.randn(rows, 8, dtype=F64) for rows in (6, 6, 2)]
    return model, Snapshot(model), data, lambda x: model(x).square().mean()


def run(snapshot, data, loss, scaler=None):
    return pass_over(snapshot, data, loss, scaler=scaler, cost=ExtraCost(), size=None)


@pytest.mark.parametrize("scaled", [False, True])
def test_the_mean_is_that_of_all_rows_whatever_the_batches(scaled):
    model, snapshot, data, loss = parts()
    loss(torch.cat(data)).backward()
    full = {name: p.grad for name, p in model.named_parameters()}
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0) if scaled else None
    assert run(snapshot, [*data, data[0] * torch.inf] if scaled else data, loss, scaler) == ([], [], [])
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
    found = run(snapshot, [data[0] * torch.inf, *data], loss, scaler)  # the first does not count
    assert found.sizes == [6, 6, 2]
    assert found.new == pytest.approx(new, rel=1e-12) and found.old == pytest.approx(old, rel=1e-12)


def test_no_batches():
    _, snapshot, _, loss = parts()
    with pytest.raises(ValueError, match="batches is empty; give some of the training set"):
        run(snapshot, [], loss)


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
    assert run(snapshot, [x * torch.inf for x in data], loss, scaler) == ([], [], [])
    assert all(mean.isnan().all() for mean in snapshot.mean.values())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    agent = sk.AGENT(model, optimizer, estimate="gradients", gamma=1.0)
    agent.refresh([x * torch.inf for x in data], loss, scaler=scaler)
    agent.backward(lambda: loss(data[0]), scaler=scaler)
    optimizer.step()
    assert not agent.state_dict()["ready"] and not agent.state_dict()["products"].any()


def test_an_extra_pass_is_not_heard_and_probes_are_armed_again():
    model = nn.Sequential(sk.SparseLinear(8, 8, block_size=4, sparsity=0.5), nn.BatchNorm1d(8))
    row = col = torch.zeros(1, dtype=torch.int32)
    probe = model[0].probe = sk.Probe.candidates(model[0].grid, row, col)
    before = model[0].values.grad = torch.ones_like(model[0].values)
    with Snapshot(model).extra_passes():
        assert model[0].values.grad is None
        model(torch.randn(5, 8)).square().sum().backward()
        assert model[0].values.grad is not None
    assert model[0].probe is probe and probe.tensor.grad is None
    assert model[1].num_batches_tracked == 0 and model[0].values.grad is before


def test_a_pass_is_counted_once_a_kind_until_a_recount():
    layer, cost = sk.SparseLinear(64, 64, block_size=16, sparsity=0.5), ExtraCost()
    flops = 2 * 64 * 32
    for rows in (1, 5):
        with cost.counted("a"):
            layer(torch.randn(rows, 64))
    assert cost.flops == 2 * flops
    cost.recount()
    with cost.counted("a"), cost.timed():
        layer(torch.randn(5, 64))
    assert cost.flops == 7 * flops and cost.seconds > 0
    other = ExtraCost()
    other.load_state_dict(cost.state_dict())
    with other.counted("a"):
        pass
    assert other.flops == 12 * flops and other.seconds == cost.seconds


def test_a_compiled_model_is_counted_as_the_plain_one():
    layer, cost = sk.SparseLinear(64, 64, block_size=16, sparsity=0.5), ExtraCost()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = torch.randn(5, 64)
    with warnings.catch_warnings(record=True) as heard, cost.counted("a"):
        y = compiled(x)
    assert cost.flops == 5 * 2 * 64 * 32 and not heard
    with cost.counted("a"):
        assert torch.equal(compiled(x), y)
