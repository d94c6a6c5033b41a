"""SparseLinear is a drop-in nn.Linear."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import sparsekern as sk
from sparsekern.nn.linear import default_block_size
from sparsekern.topology import by_norm


def test_the_arguments_are_those_of_nn_linear_in_order():
    ours, theirs = (list(inspect.signature(c).parameters) for c in (sk.SparseLinear, nn.Linear))
    assert ours[: len(theirs)] == theirs


def assert_computes_like_its_dense_layer(module, x: torch.Tensor) -> nn.Module:
    """Check outputs and all gradients of a float64 layer; return its dense layer."""
    dense = module.to_dense()
    x, z = (x.detach().clone().requires_grad_() for _ in range(2))
    y, expected = module(x), dense(z)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(module.dense_forward(z, dense.weight), expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, z.grad)
    if module.bias is not None:
        torch.testing.assert_close(module.bias.grad, dense.bias.grad)
    kept = module.dense_weight() != 0
    grads = copy.deepcopy(module)
    grads.values.data.copy_(module.values.grad)
    torch.testing.assert_close(grads.dense_weight()[kept], dense.weight.grad[kept])
    return dense


def test_it_computes_what_its_dense_twin_computes():
    layer = sk.SparseLinear(45, 70, sparsity=0.7, block_size=(16, 8), dtype=torch.float64)
    assert_computes_like_its_dense_layer(layer, torch.randn(3, 7, 45, dtype=torch.float64))


@pytest.mark.parametrize("bias", [True, False])
def test_from_dense_keeps_the_strongest_blocks(bias):
    dense = nn.Linear(12, 8, bias=bias)
    layer = sk.SparseLinear.from_dense(dense, sparsity=0.5, block_size=4)
    norms = dense.weight.detach().view(2, 4, 3, 4).norm(dim=(1, 3)).flatten()
    kept = torch.zeros(6, dtype=torch.bool)
    kept[norms.topk(3).indices] = True
    mask = kept.view(2, 1, 3, 1).expand(2, 4, 3, 4).reshape(8, 12)
    assert torch.equal(layer.dense_weight(), dense.weight * mask)
    assert (layer.bias is None) == (not bias)
    if bias:
        assert torch.equal(layer.bias, dense.bias) and layer.bias is not dense.bias


def test_a_full_layer_is_the_dense_layer_both_ways():
    dense = nn.Linear(13, 9).to(torch.bfloat16).eval()
    back = sk.SparseLinear.from_dense(dense, sparsity=0, block_size=4).eval().to_dense()
    assert torch.equal(back.weight, dense.weight) and torch.equal(back.bias, dense.bias)
    assert back.weight.dtype == torch.bfloat16 and not back.training
    assert type(back) is nn.Linear


def test_from_dense_at_given_places():
    dense = nn.Linear(12, 8)
    topology = by_norm(sk.topology.Grid(8, 12, (4, 4)), -dense.weight.detach(), 2)
    layer = sk.SparseLinear.from_dense(dense, topology=topology, capacity=4)
    assert layer.topology.blocks() == 2 and layer.values.shape[0] == 4


def test_errors_of_from_dense():
    with pytest.raises(ValueError, match="sparsity is 2"):
        sk.SparseLinear.from_dense(nn.Linear(12, 8), sparsity=2, block_size=4)
    with pytest.raises(ValueError, match="7 blocks were asked for"):
        sk.SparseLinear.from_dense(nn.Linear(12, 8), blocks=7, block_size=4)


def test_repr():
    layer = sk.SparseLinear(12, 8, False, sparsity=0.5, block_size=4)
    assert repr(layer) == (
        "SparseLinear(in_features=12, out_features=8, bias=False, block_size=(4, 4), blocks=3/6, sparsity=0.5)"
    )


def test_sparsity_is_rounded_to_whole_blocks_and_counts_real_elements():
    layer = sk.SparseLinear(10, 10, sparsity=0.75, block_size=8, seed=0)
    assert layer.topology.blocks() == 1
    rows, cols = (8 if int(t[0]) == 0 else 2 for t in (layer.row, layer.col))
    assert layer.sparsity == 1 - rows * cols / 100


def test_default_block_size():
    assert default_block_size(None) == default_block_size("cpu") == 32
    assert default_block_size("cuda") == default_block_size(torch.device("cuda", 1)) == 64
    assert sk.SparseLinear(64, 64, sparsity=0.5).block_size == (32, 32)


def test_compile_fullgraph_with_backward_moves_and_batch_sizes():
    """One graph for all batch sizes, and none of it is compiled anew when blocks move."""
    torch._dynamo.reset()
    layer = sk.SparseLinear(45, 70, sparsity=0.7, block_size=(16, 8), seed=0)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    optimizer = torch.optim.AdamW(layer.parameters())
    method = sk.SET(layer, optimizer, update_every=1)
    for tokens in (5, 7, 64, 3):
        x = torch.randn(tokens, 45)
        y = compiled(x)
        torch.testing.assert_close(y, layer(x))
        y.square().sum().backward()
        grad = layer.values.grad.clone()
        layer.values.grad = None
        layer(x).square().sum().backward()
        torch.testing.assert_close(layer.values.grad, grad)
        optimizer.step()
        optimizer.zero_grad()
        assert method.step()
    assert counter.frame_count <= 2


def test_compile_a_model_with_fresh_inputs_of_three_dimensions():
    torch._dynamo.reset()
    model = nn.Sequential(
        nn.Linear(16, 32), nn.GELU(), sk.SparseLinear(32, 32, block_size=8, sparsity=0.5), nn.LayerNorm(32)
    )
    x = torch.randn(2, 3, 16)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_and_grad_scaler(dtype):
    layer = sk.SparseLinear(45, 70, sparsity=0.7, block_size=(16, 8))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    before = layer.values.detach().clone()
    with torch.autocast("cpu", dtype=dtype):
        y = layer(torch.randn(5, 45))
    assert y.dtype == dtype and layer.values.dtype == torch.float32
    scaler.scale(y.float().square().mean()).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    assert layer.values.grad.dtype == torch.float32 and not torch.equal(before, layer.values)


def test_activation_checkpointing():
    from torch.utils.checkpoint import checkpoint

    layer = sk.SparseLinear(45, 70, sparsity=0.7, block_size=(16, 8))
    x = torch.randn(5, 45, requires_grad=True)
    layer(x).square().sum().backward()
    expected, layer.values.grad = layer.values.grad, None
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    assert torch.equal(layer.values.grad, expected)


def test_two_forwards_before_one_backward():
    layer = sk.SparseLinear(45, 70, sparsity=0.7, block_size=(16, 8))
    (layer(torch.randn(5, 45)) + layer(torch.randn(5, 45))).sum().backward()
    assert layer.values.grad is not None


def test_export_is_a_snapshot_that_runs():
    layer = sk.SparseLinear(16, 16, block_size=4, sparsity=0.5).eval()
    x = torch.randn(3, 16)
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x))
