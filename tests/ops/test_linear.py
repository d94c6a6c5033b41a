"""The op through autograd: derivatives of any order, and no more of them than asked for."""

from __future__ import annotations

import pytest
import torch
from sparsekern.kernels import eager
from torch.nn import functional as F

from sparsekern import ops
from sparsekern.topology import Grid, balanced, build_index, generator_for, rebuild_, to_dense, with_capacity

GRIDS = {
    "edges": Grid(11, 9, (4, 2)),
    "whole": Grid(8, 12, (4, 4)),
    "unstructured": Grid(5, 7, (1, 1)),
    "one block": Grid(3, 2, (8, 8)),
}


def case(grid: Grid, dtype: torch.dtype = torch.float64, tokens: int = 5):
    generator = torch.Generator().manual_seed(0)
    topology = balanced(grid, max(1, grid.cells // 2), generator_for(1))
    topology = with_capacity(topology, topology.slots + 2)
    real = topology.real()
    values = torch.randn(topology.slots, *grid.block, dtype=dtype, generator=generator)
    values = (values if real is None else values * real).requires_grad_()
    x = torch.randn(tokens, grid.in_features, dtype=dtype, generator=generator).requires_grad_()
    bias = torch.randn(grid.out_features, dtype=dtype, generator=generator).requires_grad_()
    return topology, x, values, bias


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.filterwarnings("error")
def test_gradcheck_and_gradgradcheck(grid):
    topology, x, values, bias = case(grid)
    index, real = build_index(topology), topology.real()

    def f(x, values, bias):
        # phantom elements are no parameters: a finite difference in one must not count
        return ops.linear(x, values if real is None else values * real, bias, index, grid)

    assert torch.autograd.gradcheck(f, (x, values, bias))
    assert torch.autograd.gradgradcheck(f, (x, values, bias))


@pytest.mark.parametrize("wanted", ["x", "values", "bias", "probe", "x values", "values bias", ""])
def test_only_the_gradients_asked_for_are_computed(wanted, monkeypatch):
    grid = GRIDS["edges"]
    topology, x, values, bias = case(grid)
    calls = []
    for name in ("dx", "dvalues", "all_block_norms"):
        real = getattr(eager.linear, name)
        monkeypatch.setattr(eager.linear, name, lambda *a, name=name, real=real: (calls.append(name), real(*a))[1])
    probe = ops.Probe.all_norms(grid)
    named = {"x": x, "values": values, "bias": bias, "probe": probe.tensor}
    for name, tensor in named.items():
        tensor.requires_grad_(name in wanted.split())
    y = ops.linear(x, values, bias, build_index(topology), grid, probe)
    assert y.requires_grad == bool(wanted)
    if wanted:
        y.sum().backward()
    kernels = {"x": "dx", "values": "dvalues", "probe": "all_block_norms"}
    assert calls == [kernels[name] for name in wanted.split() if name in kernels]
    assert all((tensor.grad is not None) == (name in wanted.split()) for name, tensor in named.items())


def test_a_backward_computes_both_gradients_at_once_unless_it_is_differentiated_itself(monkeypatch):
    grid = GRIDS["edges"]
    topology, x, values, _ = case(grid)
    calls = []
    monkeypatch.setattr(eager.linear, "backward", lambda *a, real=eager.linear.backward: (calls.append(a), real(*a))[1])

    def gradients(**how):
        return torch.autograd.grad(ops.linear(x, values, None, build_index(topology), grid).sum(), (x, values), **how)

    at_once = gradients()
    assert len(calls) == 1
    one_by_one = gradients(create_graph=True)
    assert len(calls) == 1
    assert all(torch.equal(a, b) for a, b in zip(at_once, one_by_one, strict=True))
    assert all(grad.requires_grad for grad in one_by_one)


@pytest.mark.parametrize("shape", [(9,), (0, 9), (2, 3, 9), (2, 0, 9)], ids=str)
def test_leading_dimensions(shape):
    grid = GRIDS["edges"]
    topology, _, values, bias = case(grid)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = ops.linear(x, values, bias, build_index(topology), grid)
    expected = F.linear(x, to_dense(topology, values), bias)
    assert y.shape == expected.shape
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert x.grad.shape == x.shape


def test_an_update_between_forward_and_backward_is_noticed():
    grid = GRIDS["whole"]
    topology, x, values, bias = case(grid)
    index = build_index(topology)
    y = ops.linear(x, values, bias, index, grid)
    rebuild_(index, topology)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_gradients_arrive_expanded_and_transposed():
    grid = GRIDS["edges"]
    topology, x, values, bias = case(grid)
    index = build_index(topology)
    weight = to_dense(topology, values)
    for dy in (
        torch.ones((), dtype=torch.float64).expand(5, 11),
        torch.randn(11, 5, dtype=torch.float64).T,
        torch.randn(5, 22, dtype=torch.float64)[:, ::2],
    ):
        dx, dbias = torch.autograd.grad(ops.linear(x, values, bias, index, grid), (x, bias), dy)
        torch.testing.assert_close(dx, dy @ weight)
        torch.testing.assert_close(dbias, dy.sum(0))


def test_the_low_precision_bias_gradient_is_summed_as_torch_does():
    grid = GRIDS["edges"]
    topology, x, values, bias = case(grid, torch.bfloat16, tokens=300)
    dy = torch.randn(300, 11).bfloat16()
    y = ops.linear(x, values, bias, build_index(topology), grid)
    (dbias,) = torch.autograd.grad(y, bias, dy)
    assert dbias.dtype == torch.bfloat16
    assert torch.equal(dbias, dy.sum(0))
