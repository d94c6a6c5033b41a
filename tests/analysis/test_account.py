"""Parameters, FLOPs and bytes, counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.analysis import account, network_sparsity, state_bytes, stored_parameters, training_bytes
from sparsekern.lab.models import resnet50
from sparsekern.topology import Grid, Topology, conv_grid

# 5 x 7 in blocks of 2 x 4: 3 x 2 blocks. Stored: (0, 0) whole, 8 elements; (2, 1): 1 x 3. One slot is free.
ROW, COL = torch.tensor([[0, 2], [0, 1]], dtype=torch.int32)
TOPOLOGY = Topology(Grid(5, 7, (2, 4)), ROW, COL)


def layer() -> sk.SparseLinear:
    return sk.SparseLinear(7, 5, topology=TOPOLOGY, capacity=3)


def test_a_sparse_layer():
    module = layer()
    found = account("fc", module, tokens=10)
    assert (found.blocks, found.cells, found.elements, found.bias, found.parameters) == (2, 6, 11, 5, 16)
    assert found.sparsity == 1 - 11 / 35
    assert found.flops == 6 * 10 * 11 and found.dense_flops == 6 * 10 * 35
    assert found.values_bytes == found.gradient_bytes == 3 * 8 * 4
    index = (module.row, module.col, *module.index)
    assert found.index_bytes == sum(t.numel() * t.element_size() for t in index)
    assert found.state_bytes == 0
    assert found.total_bytes == 2 * 96 + found.index_bytes
    assert found.dense_bytes == 2 * 35 * 4


def test_the_index_of_unstructured_blocks_is_16_bytes_a_value():
    module = sk.SparseLinear(300, 400, block_size=1, sparsity=0.9)
    held = {t.data_ptr(): t.numel() * 4 for t in (module.row, module.col, *module.index)}
    found = account("fc", module)
    assert found.index_bytes == sum(held.values())
    rest = 4 * (2 * 16 + 301 + 401)  # padding and pointers
    assert found.index_bytes - rest == 16 * 12000


def test_optimizer_state_and_frozen_values():
    module = layer()
    optimizer = torch.optim.AdamW(module.parameters())
    assert account("fc", module, optimizer=optimizer).state_bytes == 0, "no state before the first step"
    module(torch.ones(1, 7)).sum().backward()
    optimizer.step()
    found = account("fc", module, optimizer=optimizer)
    assert found.state_bytes == 2 * 96 + 4  # two moments and the step
    assert found.dense_bytes == round(35 * (8 + found.state_bytes / 24))
    module.values.requires_grad_(False)
    assert account("fc", module).gradient_bytes == 0


def test_a_dense_layer():
    found = account("head", nn.Linear(7, 5, bias=False).bfloat16(), tokens=2)
    assert (found.elements, found.bias, found.blocks, found.block) == (35, 0, 0, None)
    assert found.sparsity == 0 and found.index_bytes == 0
    assert found.total_bytes == found.dense_bytes == 2 * 35 * 2


def test_another_layer_has_no_account():
    with pytest.raises(TypeError, match="'norm' is a LayerNorm; only sparse layers and nn.Linear, .* have an account"):
        account("norm", nn.LayerNorm(4))


def test_the_bytes_and_parameters_of_a_model():
    model = nn.Sequential(layer(), nn.Linear(5, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    dense = 5 * 3 + 3
    index = account("0", model[0]).index_bytes
    assert stored_parameters(model) == 11 + 5 + dense
    assert training_bytes(model) == 2 * 4 * (24 + 5 + dense) + index
    model(torch.ones(1, 7)).sum().backward()
    optimizer.step()
    assert training_bytes(model, optimizer) == 3 * 4 * (24 + 5 + dense) + index
    assert state_bytes(None, model[1].weight) == 0
    model[1].requires_grad_(False)
    assert training_bytes(model) == 2 * 4 * (24 + 5) + 4 * dense + index


def test_a_sparse_convolution():
    """Two groups of 3 x 5 channels, kernel 1 x 2, blocks of 2 x 4: stored are (0, 2), whole, and 1 x 1 of (3, 1)."""
    grid = conv_grid(10, 6, (1, 2), (2, 4), 2)
    places = Topology(grid, *torch.tensor([[0, 3], [2, 1]], dtype=torch.int32))
    found = account("conv", sk.SparseConv2d(10, 6, (1, 2), groups=2, topology=places), tokens=24)
    assert (found.shape, found.blocks, found.cells, found.elements, found.bias) == ((6, 5, 1, 2), 2, 16, 9, 6)
    assert found.sparsity == 1 - 9 / 60 and found.numel == 60
    assert found.flops == 6 * 24 * 9 and found.dense_flops == 6 * 24 * 60
    assert found.dense_bytes == 2 * 60 * 4 and found.values_bytes == 2 * 8 * 4


def test_a_dense_convolution_says_why_it_is_dense():
    found = account("stem", nn.Conv2d(3, 8, 5), tokens=7)
    assert (found.elements, found.shape, found.note, found.flops) == (600, (8, 3, 5, 5), "stem", 6 * 7 * 600)
    assert account("conv", nn.Conv2d(8, 8, 5)).note == "" == account("fc", nn.Linear(3, 3)).note


def test_the_sparsity_of_a_network_counts_all_its_weights():
    """A layer of 11 of 35 elements; an embedding of 20 that is a head too, counted once; a stem of 12; no biases."""
    model = nn.Sequential(layer(), nn.Embedding(4, 5), nn.Linear(5, 4), nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3))
    model[2].weight = model[1].weight
    assert network_sparsity(model) == pytest.approx(24 / (35 + 20 + 12))
    assert network_sparsity(model[0]) == pytest.approx(24 / 35) and network_sparsity(nn.ReLU()) == 0
    roomy = sk.SparseLinear(16, 16, block_size=4, blocks=4, capacity=9)
    assert network_sparsity(roomy) == 0.75, "free slots are absent"


def test_resnet_50_at_90_per_cent_is_less_sparse_with_dense_ends():
    """The figures of the paper's network: the head alone has 2 of its 25 million weights."""
    for dense, whole in ((["conv1", "fc"], 0.8274), (["conv1"], 0.8996)):
        with torch.device("meta"):
            model = resnet50(num_classes=1000, in_channels=3)
            sk.sparsify_(model, 0.9, 32, ignore=dense, distribution="erk")
        model.to_empty(device="cpu")
        assert network_sparsity(model) == pytest.approx(whole, abs=1e-4)
