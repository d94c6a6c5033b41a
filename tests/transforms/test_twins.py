"""Layers of other sizes, and what no transform fits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsekern.nn.converters import grid_of
from sparsekern.transforms.twins import check, dense_twin, features, norm_of, sparse_twin


def test_what_no_transform_fits():
    with pytest.raises(ValueError, match=r"sparsity is 75; .* \(did you mean 0.75\?\)"):
        check(nn.Linear(4, 4), 75, 1)
    with pytest.raises(TypeError, match="layer is a Conv1d; it must be an nn.Linear or nn.Conv2d"):
        check(nn.Conv1d(4, 4, 1), 0.5, 1)
    with pytest.raises(ValueError, match="layer has groups = 2; Sparse-IFT is defined for convolutions of one group"):
        check(nn.Conv2d(4, 4, 1, groups=2), 0.5, 1)

    with pytest.raises(ValueError, match="pool is 0.5; it must be 1 or more"):
        check(nn.Linear(4, 4), 0.5, 0.5)


def test_twins_keep_the_kind_and_the_way():
    conv = nn.Conv2d(32, 48, (3, 5), (2, 1), padding=(1, 2), padding_mode="circular", dtype=torch.float64)
    assert features(conv) == (32, 48) and features(nn.Linear(2, 3)) == (2, 3)
    twin = dense_twin(conv, 64, 80, bias=False, device="meta")
    assert (twin.weight.shape, twin.stride, twin.bias) == ((80, 64, 3, 5), (2, 1), None)
    one = dense_twin(conv, 64, 80, pointwise=True, bias=True)
    assert (one.weight.shape, one.stride, one.padding, one.padding_mode) == ((80, 64, 1, 1), (1, 1), (0, 0), "zeros")
    conv.weight.requires_grad_(False)
    grid = grid_of(twin, 16, conv.weight.device)
    sparse = sparse_twin(twin, 7, grid.block, layer=conv, seed=3, name="a")
    assert (sparse.topology.blocks(), sparse.grid, sparse.values.dtype) == (7, grid, torch.float64)
    assert sparse.padding_mode == "circular" and not sparse.values.requires_grad and sparse.values.device.type == "cpu"


def test_default_blocks_are_those_of_the_layers():
    twin = dense_twin(nn.Linear(64, 64), 96, 96, bias=True, device="meta")
    assert grid_of(twin, None, "cpu").block == (32, 32)
    conv = nn.Conv2d(16, 64, 3)
    assert grid_of(conv, None).block == (32, 16)


def test_convolutions_have_a_norm():
    assert type(norm_of(nn.Linear(4, 4), 7)) is nn.Identity
    norm = norm_of(nn.Conv2d(4, 4, 1, dtype=torch.float64), 7)
    assert type(norm) is nn.BatchNorm2d and (norm.num_features, norm.weight.dtype) == (7, torch.float64)
