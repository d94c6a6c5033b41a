"""Sizes that are whole numbers of numpy, or tensors of one: what PyTorch's own layers accept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sparsekern as sk
from sparsekern.topology import Grid, conv_grid

KINDS = {"numpy": np.int64, "numpy32": np.int32, "tensor": torch.tensor, "tensor of one": lambda n: torch.tensor([n])}


def same(make: Callable[[Any], nn.Module], kind: Callable[[int], Any], x: Tensor) -> None:
    """Build with plain and with other sizes; the layers are the same, to the bit and to the type of every attribute."""
    plain, other = make(int), make(kind)
    assert repr(other) == repr(plain)
    assert {k: type(v) for k, v in vars(other).items()} == {k: type(v) for k, v in vars(plain).items()}
    assert torch.equal(other(x), plain(x))
    torch.export.export(other, (x,))


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_linear(kind):
    options = dict(seed=0, sparsity=0.5)
    x = torch.randn(3, 16)
    same(lambda n: sk.SparseLinear(n(16), n(24), block_size=(n(8), n(4)), **options), kind, x)
    same(lambda n: sk.SparseLinear(n(16), n(24), block_size=n(8), blocks=n(3), capacity=n(5), seed=0), kind, x)


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_convolution(kind):
    def make(n: Callable[[int], Any]) -> nn.Module:
        geometry = dict(stride=n(2), padding=(n(1), n(0)), dilation=n(1), groups=n(2))
        return sk.SparseConv2d(n(8), n(16), (n(3), n(1)), **geometry, block_size=n(4), seed=0, sparsity=0.5)

    x = torch.randn(2, 8, 6, 6)
    same(make, kind, x)
    same(lambda n: sk.SparseConv2d(n(8), n(16), n(3), block_size=None, seed=0, blocks=n(4)), kind, x)


def test_sparsify_on_layers_of_numpy_sizes():
    """nn.Linear keeps the numpy integer; a tensor as a size works in nn.Linear too."""
    model = nn.Sequential(
        nn.Linear(8, 64),
        nn.Linear(np.array([8, 8]).prod(), 64),
        nn.Linear(torch.tensor(64), 32),
        nn.Unflatten(1, (32, 1, 1)),
        nn.Conv2d(np.int64(32), np.int64(16), (np.int64(1), np.int64(1))),
    )
    sk.sparsify_(model, 0.5, 8)
    assert len(sk.sparse_layers(model)) == 4
    assert type(model[1].in_features) is type(model[2].in_features) is int
    assert model(torch.ones(1, 8)).shape == (1, 16, 1, 1)
    sk.densify(model)(torch.ones(1, 8))


def test_grids_hold_plain_numbers():
    grid = conv_grid(np.int64(8), torch.tensor(16), (np.int64(3), torch.tensor(1)), (np.int64(4), 4), np.int64(2))
    assert grid == conv_grid(8, 16, (3, 1), (4, 4), 2)
    assert repr(grid) == repr(conv_grid(8, 16, (3, 1), (4, 4), 2))
    assert repr(Grid(torch.tensor(8), np.int8(4), (2, np.int64(2)))) == repr(Grid(8, 4, (2, 2)))
