"""The control: nothing moves."""

from __future__ import annotations

import copy

import torch

import sparsekern as sk


def test_no_block_ever_moves():
    layer = sk.SparseLinear(8, 12, block_size=(4, 2), blocks=5)
    before = copy.deepcopy(layer.state_dict())
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    method = sk.Static(layer, optimizer, update_every=1)
    for _ in range(3):
        layer(torch.ones(1, 8)).sum().backward()
        optimizer.step()
        assert method.step() is False
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())
    assert method.metrics()["updates"] == 3 and method.metrics()["churn/"] == 0
