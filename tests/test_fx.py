"""torch.fx: a sparse layer is one node of the graph, as PyTorch's own layers are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import sparsekern as sk

MODELS = [
    (nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), (3, 8)),
    (
        nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular"), nn.ReLU(), nn.Conv2d(8, 4, 1)),
        (2, 4, 5, 5),
    ),
    (nn.Sequential(nn.Conv1d(4, 8, 3), nn.ReLU(), nn.Conv1d(8, 4, 1)), (2, 4, 9)),
]


@pytest.mark.parametrize(("model", "shape"), MODELS, ids=["linear", "conv2d", "conv1d"])
def test_a_graph_runs_trains_and_moves(model, shape):
    model = sk.sparsify_(copy.deepcopy(model), 0.5, 2)
    graph = torch.fx.symbolic_trace(model)
    nodes = [(node.op, node.target) for node in graph.graph.nodes]
    assert nodes[1:-1] == [("call_module", "0"), ("call_module", "1"), ("call_module", "2")]
    x = torch.randn(shape)
    assert torch.equal(graph(x), model(x))
    assert list(sk.sparse_layers(graph)) == ["0", "2"]
    optimizer = torch.optim.SGD(graph.parameters(), lr=0.1)
    method = sk.SET(graph, optimizer, update_every=1)
    graph(x).sum().backward()
    optimizer.step()
    assert method.step() and torch.equal(graph(x), model(x))


def test_a_layer_by_itself_is_one_sentence():
    with pytest.raises(TypeError, match="a sparse layer is a node of torch.fx and cannot be traced by itself"):
        torch.fx.symbolic_trace(sk.SparseLinear(8, 8, block_size=4, sparsity=0.5))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(mode):
    layer = sk.SparseLinear(8, 4, block_size=2, sparsity=0.5)
    graph = make_fx(layer, tracing_mode=mode, _allow_non_fake_inputs=True)(torch.randn(3, 8))
    x = torch.randn(5, 8)
    assert torch.equal(graph(x), layer(x))
