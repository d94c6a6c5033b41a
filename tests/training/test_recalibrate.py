"""Running statistics taken anew."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparsekern as sk


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
