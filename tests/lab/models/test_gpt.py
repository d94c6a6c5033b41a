"""The size of GPT-2 small, causality, and its initial values."""

from __future__ import annotations

import pytest
import torch

import sparsekern as sk
from sparsekern.lab.models import GPT, gpt_small


def tiny(width_multiplier=1.0):
    return GPT(50, 16, depth=2, heads=2, head_features=16, width_multiplier=width_multiplier)


def test_the_parameters_are_those_of_gpt2_small():
    with torch.device("meta"):
        assert sum(p.numel() for p in gpt_small().parameters()) == 124_439_808


def test_no_token_sees_those_behind_it():
    model = tiny()
    tokens = torch.randint(50, (3, 16))
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 50
    before, after = model(tokens), model(changed)
    assert before.shape == (3, 16, 50)
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_initial_values():
    layer = tiny(8).layers[0]
    assert float(layer.fc1.weight.detach().std()) == pytest.approx(0.02, rel=0.03)
    assert float(layer.fc2.weight.detach().std()) == pytest.approx(0.01, rel=0.03)
    assert not layer.qkv.bias.any()


def test_widths_are_whole_heads_and_the_embedding_stays_dense():
    model = tiny(lambda features: features + 17)
    assert model.layers[0].heads == 3 and model.tokens.embedding_dim == 48
    sk.sparsify_(model, 0.5, 16)
    assert len(sk.sparse_layers(model)) == 8
    torch.nn.functional.cross_entropy(
        model(torch.randint(50, (2, 8))).flatten(0, 1), torch.randint(50, (16,))
    ).backward()
    assert all(p.grad is not None for p in model.parameters())
