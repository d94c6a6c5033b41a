"""The stand-in for a dense weight answers questions and refuses to compute."""

from __future__ import annotations

import copy
import operator

import pytest
import torch

import sparsekern as sk

WEIGHT = sk.SparseLinear(12, 8, block_size=4, sparsity=0.5, dtype=torch.bfloat16).weight


def test_it_answers_what_libraries_ask():
    assert WEIGHT.shape == (8, 12) and WEIGHT.size() == (8, 12) and WEIGHT.size(1) == 12 and WEIGHT.size(-1) == 12
    assert WEIGHT.dim() == WEIGHT.ndim == 2 and WEIGHT.numel() == 96
    assert WEIGHT.dtype == torch.bfloat16 and WEIGHT.device == torch.device("cpu") and WEIGHT.requires_grad
    assert repr(WEIGHT) == "WeightInfo(shape=(8, 12), dtype=torch.bfloat16, device='cpu')"
    assert WEIGHT is not None
    assert copy.deepcopy(WEIGHT).shape == (8, 12)


def test_it_follows_the_values():
    layer = sk.SparseLinear(12, 8, block_size=4, sparsity=0.5)
    layer.values.requires_grad_(False)
    assert not layer.weight.requires_grad
    assert layer.half().weight.dtype == torch.float16


@pytest.mark.parametrize(
    "compute",
    [
        lambda w: torch.nn.functional.linear(torch.ones(2, 12), w),
        lambda w: torch.relu(w),
        lambda w: torch.ones(2, 8) @ w,
        lambda w: w @ torch.ones(12),
        lambda w: w * 2,
        lambda w: 2 * w,
        lambda w: w + 1,
        lambda w: -w,
        lambda w: w[0],
        lambda w: operator.setitem(w, 0, 1),
        lambda w: list(w),
        lambda w: len(w),
        lambda w: w > 0,
        lambda w: bool(w),
        lambda w: float(w),
    ],
)
def test_a_computation_raises_and_names_the_way_out(compute):
    with pytest.raises(TypeError, match=r"cannot compute .* on the weight of a sparse layer.*layer\.to_dense\(\)"):
        compute(WEIGHT)


@pytest.mark.parametrize("name", ["data", "grad", "detach", "norm", "T", "copy_"])
def test_an_unknown_attribute_names_the_way_out(name):
    assert not hasattr(WEIGHT, name)
    with pytest.raises(AttributeError, match=rf"no '{name}': .*layer\.values.*layer\.to_dense\(\)"):
        getattr(WEIGHT, name)


def test_initialising_the_weight_raises():
    with pytest.raises((TypeError, AttributeError), match=r"to_dense\(\)"):
        torch.nn.init.xavier_uniform_(WEIGHT)


def test_assigning_a_weight_raises():
    layer = sk.SparseLinear(12, 8, block_size=4, sparsity=0.5)
    for value in (torch.nn.Parameter(torch.ones(8, 12)), torch.ones(8, 12)):
        with pytest.raises((AttributeError, KeyError, TypeError)):
            layer.weight = value
    assert "weight" not in dict(layer.named_parameters())


def test_the_weight_of_a_convolution_has_four_axes():
    weight = sk.SparseConv2d(6, 8, (3, 2), groups=2, block_size=4, sparsity=0.5).weight
    assert weight.shape == (8, 3, 3, 2) and weight.dim() == weight.ndim == 4 and weight.numel() == 144
    with pytest.raises(TypeError, match=r"to_dense\(\)"):
        torch.nn.functional.conv2d(torch.ones(1, 6, 4, 4), weight)
