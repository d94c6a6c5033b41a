"""The size of GPT-2 small, causality, initial values, the parts of Llama, and drawing text."""

from __future__ import annotations

import pytest
import torch

import sparsekern as sk
from sparsekern.errors import InputError
from sparsekern.lab.models import GPT, gpt_small
from sparsekern.lab.models.gpt import generate, rotated


def tiny(width_multiplier=1.0, **options):
    return GPT(50, 16, depth=2, heads=2, head_features=16, width_multiplier=width_multiplier, **options)


def test_the_parameters_are_those_of_gpt2_small():
    with torch.device("meta"):
        assert sum(p.numel() for p in gpt_small().parameters()) == 124_439_808


@pytest.mark.parametrize("options", [{}, {"activation": "swiglu", "positions": "rotary", "tied": False}])
def test_no_token_sees_those_behind_it(options):
    model = tiny(**options)
    tokens = torch.randint(50, (3, 16))
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 50
    before, after = model(tokens), model(changed)
    assert before.shape == (3, 16, 50)
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_initial_values():
    layer = tiny(8).layers[0]
    assert float(layer.mlp.fc1.weight.detach().std()) == pytest.approx(0.02, rel=0.03)
    assert float(layer.mlp.fc2.weight.detach().std()) == pytest.approx(0.01, rel=0.03)
    assert not layer.attention.qkv.bias.any()


def test_widths_are_whole_heads_and_the_embedding_stays_dense():
    model = tiny(lambda features: features + 17)
    assert model.layers[0].attention.heads == 3 and model.tokens.embedding_dim == 48
    sk.sparsify_(model, 0.5, 16)
    assert len(sk.sparse_layers(model)) == 8
    torch.nn.functional.cross_entropy(
        model(torch.randint(50, (2, 8))).flatten(0, 1), torch.randint(50, (16,))
    ).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_rotary_scores_depend_on_the_distance_alone():
    q, k = torch.randn(1, 8).expand(6, 8), torch.randn(1, 8).expand(6, 8)
    scores = rotated(q) @ rotated(k).T  # (queries, keys)
    torch.testing.assert_close(scores[:-1, :-1], scores[1:, 1:])
    assert not torch.allclose(scores[0, 1], scores[0, 2])
    torch.testing.assert_close(rotated(q).norm(dim=-1), q.norm(dim=-1))
    torch.testing.assert_close(rotated(q)[0], q[0])  # the first position is not rotated


def test_swiglu_multiplies_its_two_parts():
    mlp = tiny(activation="swiglu").layers[0].mlp
    assert mlp.fc1.out_features == 2 * mlp.fc2.in_features == 2 * 96  # 8/3 of 32 features, in whole blocks of 32
    x = torch.randn(1, 1, 32)
    gate, value = mlp.fc1(x).split(96, -1)
    torch.testing.assert_close(mlp(x), mlp.fc2(gate * gate.sigmoid() * value))


def test_a_free_head_is_a_layer_of_its_own():
    assert (
        sum(p.numel() for p in tiny(tied=False).parameters()) == sum(p.numel() for p in tiny().parameters()) + 50 * 32
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"activation": "relu"}, "activation is 'relu'; it must be one of gelu, swiglu"),
        ({"positions": "none"}, "positions is 'none'; it must be one of learnt, rotary"),
    ],
)
def test_unknown_parts_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        tiny(**options)


def test_rotary_positions_need_pairs():
    with pytest.raises(InputError, match="head_features is 5; rotary positions need an even number"):
        GPT(50, 16, depth=1, heads=1, head_features=5, positions="rotary")


def test_text_is_drawn_from_the_seed_and_longer_than_the_context():
    model = tiny().train()
    with torch.no_grad():
        model.tokens.weight.mul_(3)  # else all tokens are equally likely
    prompt = torch.tensor([3])
    first = generate(model, prompt, 20, seed=1)
    assert first.shape == (20,) and torch.equal(first, generate(model, prompt, 20, seed=1))
    assert not torch.equal(first, generate(model, prompt, 20, seed=2))
    likeliest = generate(model, prompt, 3, temperature=0)
    assert int(likeliest[0]) == int(model(prompt[None])[0, -1].argmax())
    assert model.training
