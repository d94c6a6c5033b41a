"""The fused sum against a loop over the branches."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsekern.transforms.branches import ReluSum, sum_of_branches


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU(), nn.Identity()])
@pytest.mark.parametrize(("shape", "dim"), [((4, 15), -1), ((2, 15, 3, 5), -3), ((15,), -1), ((0, 15), -1)])
def test_a_loop_over_the_branches(activation, shape, dim):
    h = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = sum_of_branches(activation, h, 3, dim)
    loop = sum(activation(part) for part in h.chunk(3, dim))
    torch.testing.assert_close(y, loop)
    dy = torch.randn_like(y)
    torch.testing.assert_close(*(torch.autograd.grad(one, h, dy)[0] for one in (y, loop)))


def test_gradients_of_gradients():
    h = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h: ReluSum.apply(h, 2, -1), h)
    assert torch.autograd.gradgradcheck(lambda h: ReluSum.apply(h, 2, -1), h)


def test_one_byte_a_number_is_kept():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ReluSum.apply(torch.randn(8, 12, requires_grad=True), 4, -1)
    assert [(t.dtype, t.numel()) for t in kept] == [(torch.bool, 96)]


def test_channels_stay_last():
    h = torch.randn(2, 6, 4, 4, requires_grad=True).contiguous(memory_format=torch.channels_last)
    y = ReluSum.apply(h, 2, -3)
    assert y.is_contiguous(memory_format=torch.channels_last)
    (dh,) = torch.autograd.grad(y, h, torch.ones_like(y))
    assert dh.is_contiguous(memory_format=torch.channels_last)


def test_it_compiles_whole():
    h = torch.randn(4, 6, requires_grad=True)
    compiled = torch.compile(lambda h: sum_of_branches(nn.ReLU(), h, 2, -1), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(h), h.relu().chunk(2, -1)[0] + h.relu().chunk(2, -1)[1])
