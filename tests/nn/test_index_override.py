"""A layer that computes with part of its blocks for a while."""

from __future__ import annotations

import copy

import pytest
import torch

import sparsekern as sk
from sparsekern.nn import lend_index
from sparsekern.topology import empty_index, mask_index, mask_index_, to_dense


def layer(block: int = 4) -> sk.SparseLinear:
    return sk.SparseLinear(12, 8, sparsity=0.3, block_size=block, seed=0, dtype=torch.float64)


@pytest.mark.parametrize("block", [1, 4])
def test_forward_and_gradients_are_those_of_the_masked_weight(block):
    module = layer(block)
    keep = torch.rand(module.values.shape[0], generator=torch.Generator().manual_seed(1)) < 0.5
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    with lend_index(module, mask_index(module.index, keep, module.block_size)):
        y = module(x)
    weight = to_dense(module.topology, module.values.detach() * keep.view(-1, 1, 1)).requires_grad_()
    expected = torch.nn.functional.linear(x, weight, module.bias)
    torch.testing.assert_close(y, expected)
    dx, dvalues = torch.autograd.grad(y.square().sum(), (x, module.values))
    dx_dense, dweight = torch.autograd.grad(expected.square().sum(), (x, weight))
    torch.testing.assert_close(dx, dx_dense)
    torch.testing.assert_close(dvalues, sk.topology.gather_blocks(module.topology, dweight) * keep.view(-1, 1, 1))


def test_a_mask_is_a_bool_a_slot():
    module = layer()
    slots = module.values.shape[0]
    for keep in (torch.ones(slots), torch.ones(slots - 1, dtype=torch.bool), torch.ones(slots, 1, dtype=torch.bool)):
        with pytest.raises(ValueError, match=rf"it must be torch.bool \({slots},\), one a slot"):
            mask_index(module.index, keep, module.block_size)


def test_afterwards_the_layer_has_its_own_index_also_after_an_error():
    module = layer()
    own = module.index
    none = mask_index(own, torch.zeros(module.values.shape[0], dtype=torch.bool), module.block_size)

    def fail_within():
        with lend_index(module, none):
            assert module.index is none
            raise KeyError

    with pytest.raises(KeyError):
        fail_within()
    assert all(a is b for a, b in zip(module.index, own, strict=True))
    copy.deepcopy(module)(torch.zeros(1, 12, dtype=torch.float64))


def test_compiled_code_goes_on_while_masks_change():
    torch._dynamo.reset()
    module = layer()
    lent = empty_index(module.topology)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 12, dtype=torch.float64)
    slots = module.values.shape[0]
    for number in range(4):
        keep = torch.arange(slots) % 4 != number
        mask_index_(lent, module.index, keep, module.block_size)
        with lend_index(module, lent):
            if number == 1:
                torch.compiler.set_stance("fail_on_recompile")
            try:
                y = compiled(x)
            finally:
                torch.compiler.set_stance("default")
            torch.testing.assert_close(y, module(x))


def test_an_index_of_another_layer_is_refused():
    module, other = layer(), sk.SparseLinear(12, 8, sparsity=0, block_size=4)
    with pytest.raises(ValueError, match=r"index has 6 slots and 2 block rows; the layer has 4 and 2"):
        lend_index(module, other.index).__enter__()


def test_one_index_at_a_time():
    module = layer()
    with lend_index(module, module.index), pytest.raises(RuntimeError, match="already computes with another index"):
        lend_index(module, module.index).__enter__()


def test_a_copy_made_meanwhile_has_its_own_index():
    module = layer()
    keep = torch.zeros(module.row.shape[0], dtype=torch.bool)
    with lend_index(module, mask_index(module.index, keep, module.block_size), module.index):
        twin = copy.deepcopy(module)
    x = torch.rand(2, 12, dtype=torch.float64)
    assert torch.equal(twin(x), module(x)) and twin.gradient_index is None
