"""What several passes over one batch have in common."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.training.passes import (
    ExtraCost,
    RandomState,
    backpropagate,
    extra_passes,
    keep_norm_statistics,
    loss_of,
    perturbed,
    scale_of,
    without_gradients,
    without_sync,
)


def test_dropout_draws_the_same_again():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
    x = torch.randn(4, 8)
    randomness = RandomState(model)
    first = model(x)
    after = torch.get_rng_state()
    assert not torch.equal(model(x), first)
    randomness.restore()
    assert torch.equal(model(x), first)
    assert torch.equal(torch.get_rng_state(), after)


def test_statistics_are_kept_and_the_pass_sees_the_batch():
    model = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8, momentum=None))
    x = torch.randn(16, 8) * 3 + 1
    twin = copy.deepcopy(model)
    with keep_norm_statistics(model):
        y = model(x)
    assert torch.equal(y, twin(x))
    fresh = nn.BatchNorm1d(8).state_dict()
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(model[0], name), fresh[name])
    assert not torch.equal(twin[0].running_mean, fresh["running_mean"])


def test_instance_norm_and_errors():
    norm = nn.InstanceNorm1d(4, track_running_stats=True)
    before = norm.running_mean.clone()
    try:
        with keep_norm_statistics(norm):
            norm(torch.randn(2, 4, 6) + 5)
            raise KeyError
    except KeyError:
        pass
    assert torch.equal(norm.running_mean, before)


def test_a_model_without_ranks_needs_no_sync():
    with without_sync(nn.Linear(2, 2)):
        pass


def test_gradients_from_before_are_there_again():
    model = nn.Linear(3, 2)
    model(torch.ones(1, 3)).sum().backward()
    before = model.weight.grad
    with without_gradients(model.parameters()):
        assert model.weight.grad is None
        model(torch.ones(1, 3)).sum().backward()
    assert model.weight.grad is before and torch.equal(before, torch.ones(2, 3))


def test_an_extra_pass_is_not_heard_and_probes_are_armed_again():
    model = nn.Sequential(sk.SparseLinear(8, 8, block_size=4, sparsity=0.5), nn.BatchNorm1d(8))
    row = col = torch.zeros(1, dtype=torch.int32)
    probe = model[0].probe = sk.Probe.candidates(model[0].grid, row, col)
    with extra_passes(model):
        model(torch.randn(5, 8)).square().sum().backward()
    assert model[0].probe is probe and probe.tensor.grad is None
    assert model[1].num_batches_tracked == 0 and model[0].values.grad is not None


def test_a_scale():
    cpu = torch.device("cpu")
    assert scale_of(None, cpu) == 1
    assert scale_of(torch.amp.GradScaler("cpu", init_scale=8.0), cpu) == 8


def test_a_perturbed_batch_is_made_at_once_and_leaves_no_trace():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = []

    def perturb():
        made.append(torch.ones(4, 3))
        model(made[-1]).sum().backward()
        return made[-1]

    closure = perturbed(model, lambda batch: batch.sum(), perturb)
    assert len(made) == 1 and float(closure()) == 12 and float(closure()) == 12 and len(made) == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_without_gradients_a_loss_needs_no_graph():
    with torch.no_grad():
        assert loss_of(lambda: torch.ones(())) == 1


def test_gradients_are_scaled_and_added_and_the_loss_is_not():
    x = torch.tensor(3.0, requires_grad=True)
    loss = backpropagate(x * x, torch.amp.GradScaler("cpu", init_scale=8.0))
    assert loss == 9 and not loss.requires_grad and x.grad == 48
    backpropagate(x * x, None)
    assert x.grad == 54


def test_statistics_are_the_means_over_the_batches():
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model[0].eval()
    batches = [torch.randn(10, 3) + k for k in range(4)]
    model(torch.full((5, 3), 100.0))  # what is to be forgotten
    assert sk.recalibrate_norms(model, [(b, "label") for b in batches]) == 1
    torch.testing.assert_close(model[1].running_mean, torch.stack([b.mean(0) for b in batches]).mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack([b.var(0) for b in batches]).mean(0))
    assert model[1].momentum == 0.1 and model[1].training and not model[0].training


def test_no_batch_changes_nothing():
    model = nn.Sequential(nn.BatchNorm1d(3))
    model(torch.randn(8, 3))
    before = model[0].running_mean.clone()
    with pytest.raises(ValueError, match="batches is empty; give some of the training set"):
        sk.recalibrate_norms(model, [])
    assert torch.equal(model[0].running_mean, before)


def test_a_model_without_norms():
    assert sk.recalibrate_norms(nn.Linear(2, 2), []) == 0


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
