"""The registry of classes that can become sparse, and a class that it is taught: GPT-2's transposed linear layer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import sparsekern as sk
from sparsekern.files.conversion import bsr_state, dense_state, sparse_state
from sparsekern.nn import register_converter
from sparsekern.nn.converters import CONVERTERS, class_name, converter_of


class Transposed(nn.Module):
    """A linear layer as GPT-2 has it: ``weight (in, out)``."""

    def __init__(self, outs: int, ins: int) -> None:
        super().__init__()
        self.outs, self.ins = outs, ins
        self.weight = nn.Parameter(torch.randn(ins, outs))
        self.bias = nn.Parameter(torch.randn(outs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr("sparsekern.nn.converters.CONVERTERS", CONVERTERS)  # the dict itself is what changes
    register_converter(
        Transposed,
        sk.SparseLinear,
        lambda layer: {"in_features": layer.ins, "out_features": layer.outs},
        rebuild=lambda layer: Transposed(layer.out_features, layer.in_features),
        transposed=True,
    )
    yield
    del CONVERTERS[Transposed]


def test_what_comes_with_it():
    assert [converter_of(m).sparse for m in (nn.Linear(2, 2), nn.Conv1d(2, 2, 1), nn.Conv2d(2, 2, 1))] == [
        sk.SparseLinear, sk.SparseConv1d, sk.SparseConv2d,
    ]  # fmt: skip
    assert converter_of(nn.Conv3d(2, 2, 1)) is None
    assert converter_of(nn.modules.linear.NonDynamicallyQuantizableLinear(2, 2)).dense is nn.Linear
    assert class_name(nn.Linear) == "nn.Linear" and class_name(Transposed) == "Transposed"


@pytest.mark.parametrize("init", ["balanced", "random", "norm"])
@pytest.mark.parametrize("block", [4, 1, (8, 4)])
def test_a_class_that_was_taught(registered, init, block):
    model = nn.Sequential(Transposed(16, 16), nn.ReLU(), Transposed(24, 16))  # square: a wrong side would pass
    own = copy.deepcopy(model)
    sk.sparsify_(model, 0.5, block, init=init)
    layer = model[0]
    assert type(layer) is sk.SparseLinear and layer.weight.shape == (16, 16) and model[2].weight.shape == (16, 24)
    x = torch.randn(3, 16)
    dense = sk.densify(model)
    assert type(dense[0]) is Transposed
    torch.testing.assert_close(dense(x), model(x))
    if init == "norm":
        kept = dense[0].weight != 0
        assert 0.4 < kept.float().mean() < 0.6 and torch.equal(dense[0].weight[kept], own[0].weight[kept])
        norms = own[0].weight.abs()
        assert block != 1 or norms[kept].min() >= norms[~kept].max()
    rows = sk.summary(dense, x).rows
    assert [row.tokens for row in rows] == [3, 3] and [row.shape for row in rows] == [(16, 16), (16, 24)]
    assert [row.tokens for row in sk.summary(model, x).rows] == [3, 3]


def test_its_topology_in_a_layer_of_its_own(registered):
    """The topology of such a layer makes a ``SparseLinear`` whose dense twin is an ``nn.Linear``, of its shape."""
    x = torch.randn(3, 64)
    sparse = sk.sparsify_(nn.Sequential(Transposed(32, 64)), 0.5, 16)[0]
    own = sk.SparseLinear(64, 32, topology=sparse.topology)
    assert own.weight.shape == own.to_dense().weight.shape == (32, 64)
    torch.testing.assert_close(own.to_dense()(x), own(x))
    again = sk.SparseLinear.from_dense(sparse.to_dense(), topology=sparse.topology)
    assert again.weight.shape == (64, 32) and torch.equal(again.values, sparse.values)


def test_its_checkpoints(registered, tmp_path):
    pytest.importorskip("safetensors")
    model = sk.sparsify_(nn.Sequential(Transposed(16, 16)), 0.5, 4)
    other = nn.Sequential(Transposed(16, 16))
    kept = model[0].dense_weight() != 0
    model.load_state_dict(other.state_dict())
    assert torch.equal(model[0].dense_weight(), other[0].weight * kept)
    sk.save(model, tmp_path / "a.safetensors")
    sk.load_(other, tmp_path / "a.safetensors")
    assert torch.equal(other[0].weight, model[0].dense_weight())
    state = model.state_dict()
    assert torch.equal(dense_state(state)["0.weight"], model[0].dense_weight())
    assert torch.equal(bsr_state(state)["0.weight"], model[0].dense_weight())
    assert torch.equal(dense_state(sparse_state(state, sparsity=None, block=(2, 2)))["0.weight"], other[0].weight)
    linear = sk.sparsify_(nn.Sequential(nn.Linear(16, 16)), 0.5, 4)  # blocks are the same, whichever way a class writes
    sk.load_(linear, tmp_path / "a.safetensors")
    assert torch.equal(linear[0].dense_weight(), model[0].dense_weight().t())
    again = copy.deepcopy(model)
    assert type(again[0].to_dense()) is Transposed
