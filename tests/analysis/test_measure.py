"""Layers beside their dense twins, and peaks of memory. No test here looks at a time."""

from __future__ import annotations

import pytest
import torch

import sparsekern as sk
from sparsekern.analysis import time_layer
from sparsekern.analysis.summary import peak_above


def test_timing_leaves_the_layer_as_it_was():
    for bias, frozen in ((True, False), (False, False), (True, True)):
        layer = sk.SparseLinear(16, 24, bias, block_size=4, sparsity=0.5).requires_grad_(not frozen)
        x = torch.ones(2, 3, 16)
        with torch.no_grad():
            sparse, dense = time_layer(layer, x, repeats=1)
        assert sparse > 0 and dense > 0
        assert layer.values.grad is None and x.grad is None and not x.requires_grad


@pytest.mark.parametrize("options", [{}, {"padding": "same", "bias": False}, {"padding": 1, "padding_mode": "reflect"}])
def test_timing_a_convolution(options):
    layer = sk.SparseConv2d(8, 12, 3, block_size=4, sparsity=0.5, **options)
    x = torch.ones(2, 8, 6, 5)
    assert min(time_layer(layer, x, repeats=1)) > 0 and min(time_layer(layer, x[0], repeats=1)) > 0
    assert layer.values.grad is None and not x.requires_grad
    torch.testing.assert_close(layer.dense_forward(x, layer.dense_weight()), layer(x))


def test_timing_and_summary_of_values_that_are_computed():
    layer = torch.nn.utils.parametrizations.weight_norm(sk.SparseLinear(16, 24, block_size=4, sparsity=0.5), "values")
    assert min(time_layer(layer, torch.ones(3, 16), repeats=1)) > 0
    summary = str(sk.summary(torch.nn.Sequential(layer, torch.nn.Linear(24, 4)), torch.ones(3, 16)))
    assert f"of the model's {16 * 24 + 24 + 24 * 4 + 4} parameters stay dense" in summary


CPU = torch.device("cpu")


def test_what_is_freed_in_between_does_not_add_up():
    def run():
        for _ in range(3):
            torch.zeros(1000)  # 4000 bytes, gone before the next

    assert peak_above(run, CPU) == 4000


def test_the_highest_moment_counts():
    def run():
        a = torch.zeros(16)
        b = torch.zeros(32)
        del a
        del b
        torch.zeros(16)

    assert peak_above(run, CPU) == 64 + 128


def test_nothing():
    kept = torch.zeros(8)
    assert peak_above(kept.zero_, CPU) == 0
