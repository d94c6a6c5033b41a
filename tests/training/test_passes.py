"""What several passes over one batch have in common."""

from __future__ import annotations

import copy

import torch
from torch import nn

from sparsekern.training.passes import Randomness, keep_norm_statistics, without_sync


def test_dropout_draws_the_same_again():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
    x = torch.randn(4, 8)
    randomness = Randomness(model)
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
