"""SplitAttention against PyTorch's attention, and PyTorch's transformer layers made sparse."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import sparsekern as sk
from sparsekern.nn import SplitAttention, split_attention_

CONSTRUCTIONS = [
    {},
    {"batch_first": True},
    {"bias": False, "kdim": 12, "vdim": 20},
    {"add_bias_kv": True, "batch_first": True},
    {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True, "kdim": 12, "batch_first": True},
]


def attention(**options) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    made = nn.MultiheadAttention(32, 4, **options)
    for name in ("in_proj_bias", "out_proj.bias"):
        if name in dict(made.named_parameters()):
            nn.init.normal_(made.get_parameter(name))
    return made


def inputs(made: nn.Module, batched: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(5, 3, 32), (7, 3, made.kdim), (7, 3, made.vdim)]
    found = [torch.randn(shape, generator=generator) for shape in shapes]
    if not batched:
        return [x[:, 0] for x in found]
    return [x.transpose(0, 1) for x in found] if made.batch_first else found


def masks(batched: bool) -> list[dict]:
    generator = torch.Generator().manual_seed(2)
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[1, 5:] = True
    padding = padding if batched else padding[1]
    causal = torch.ones(5, 7, dtype=torch.bool).triu(1)
    each = torch.randn((12 if batched else 4), 5, 7, generator=generator)
    added = torch.zeros(padding.shape).masked_fill(padding, -torch.inf)
    return [
        {},
        {"key_padding_mask": padding},
        {"attn_mask": causal},
        {"attn_mask": causal, "is_causal": True},
        {"attn_mask": each},
        {"attn_mask": each, "key_padding_mask": added},
        {"attn_mask": causal, "key_padding_mask": padding},
    ]


@pytest.mark.parametrize("options", CONSTRUCTIONS, ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_it_computes_what_pytorchs_attention_does(options: dict, training: bool):
    made = attention(**options).train(training)
    split = SplitAttention(made).train(training)
    weights = [{"need_weights": False}, {}, {"average_attn_weights": False}]
    for batched, how in itertools.product((True, False), weights):
        for mask in masks(batched):
            if (
                "is_causal" in mask
                and "need_weights" in how
                and ("add_bias_kv" in options or "add_zero_attn" in options)
            ):
                continue  # PyTorch masks its own extra keys then, and does not when it returns the weights
            x, y = inputs(made, batched), inputs(made, batched)
            for part in (*x, *y):
                part.requires_grad_()
            expected, expected_weights = made(*x, **mask, **how)
            found, found_weights = split(*y, **mask, **how)
            torch.testing.assert_close(found, expected)
            if expected_weights is None:
                assert found_weights is None
            else:
                torch.testing.assert_close(found_weights, expected_weights)
            expected.square().sum().backward()
            found.square().sum().backward()
            for a, b in zip(x, y, strict=True):
                torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-5)


def test_dropout_of_the_weights():
    made = attention(dropout=0.5, batch_first=True)
    split = SplitAttention(made)
    for how in ({"need_weights": False}, {"average_attn_weights": False}):
        torch.manual_seed(3)
        expected = made(*inputs(made, True), **how)
        torch.manual_seed(3)
        found = split(*inputs(made, True), **how)
        torch.testing.assert_close(found[0], expected[0])


@pytest.mark.parametrize("options", CONSTRUCTIONS, ids=str)
def test_checkpoints_of_pytorchs_attention(options: dict):
    made, model = attention(**options), nn.ModuleDict({"a": SplitAttention(attention(**options))})
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    model.load_state_dict({f"a.{key}": value for key, value in made.state_dict().items()})
    x = inputs(made, True)
    torch.testing.assert_close(model["a"](*x)[0], made(*x)[0], rtol=1e-4, atol=1e-4)
    model.load_state_dict(model.state_dict())  # and its own
    sk.sparsify_(model, 0.5, 4, init="norm")
    model.load_state_dict({f"a.{key}": value for key, value in made.state_dict().items()})  # dense into sparse
    assert len(sk.sparse_layers(model)) == 4


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_a_sparse_encoder_is_its_dense_twin_with_every_mask(batch_first: bool, norm_first: bool):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=batch_first, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first and batch_first)
    split_attention_(model)
    sk.sparsify_(model, 0.5, 8)
    assert len(sk.sparse_layers(model)) == 12
    dense = sk.densify(model)
    x = torch.randn(3, 6, 32)
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[1, 4:] = True
    causal = nn.Transformer.generate_square_subsequent_mask(6)
    x = x if batch_first else x.transpose(0, 1)
    for training, grad in ((True, True), (False, True), (False, False)):
        model.train(training), dense.train(training)
        with torch.set_grad_enabled(grad):
            for mask in ({}, {"src_key_padding_mask": padding}, {"mask": causal, "is_causal": True}):
                torch.testing.assert_close(model(x, **mask), dense(x, **mask), rtol=1e-4, atol=1e-5)


def test_splitting_alone_changes_nothing_of_a_whole_transformer():
    torch.manual_seed(0)
    model = nn.Transformer(32, 4, 2, 2, 64, dropout=0.0, batch_first=True).eval()
    source, target = torch.randn(2, 5, 32), torch.randn(2, 4, 32)
    padding = torch.tensor([[False] * 5, [False, False, False, True, True]])
    options = {"src_key_padding_mask": padding, "memory_key_padding_mask": padding}
    options |= {"tgt_mask": nn.Transformer.generate_square_subsequent_mask(4)}
    with torch.no_grad():
        expected = model(source, target, **options)
        torch.testing.assert_close(split_attention_(model)(source, target, **options), expected, rtol=1e-4, atol=1e-5)
    sk.sparsify_(model, 0.5, 8)
    model(source, target).sum().backward()
    assert len(sk.sparse_layers(model)) == 32
    assert all(layer.values.grad.abs().sum() > 0 for layer in sk.sparse_layers(model).values())


def test_the_feed_forward_alone():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()
    sk.sparsify_(model, 0.5, 8, ignore="*.out_proj")
    assert len(sk.sparse_layers(model)) == 4
    x = torch.randn(3, 6, 32)
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[1, 4:] = True
    with torch.no_grad():
        for mask in (None, padding):
            expected = sk.densify(model)(x, src_key_padding_mask=mask)
            kept = slice(None) if mask is None else ~mask  # PyTorch's fast path leaves zeros where the padding is
            torch.testing.assert_close(model(x, src_key_padding_mask=mask)[kept], expected[kept], rtol=1e-4, atol=1e-5)


def test_what_is_wrong_is_one_sentence():
    model = nn.TransformerEncoderLayer(32, 4)
    with pytest.raises(ValueError, match=r"self_attn.out_proj: nn.TransformerEnc.*split_attention_ changes that"):
        sk.sparsify_(model, 0.5, 8)
    cases = [
        (lambda: split_attention_(nn.MultiheadAttention(8, 2)), ValueError, "model is itself an nn.MultiheadAttention"),
        (
            lambda: split_attention_(model, nn.Linear),
            ValueError,
            "'self_attn.out_proj', a Non.*must match nn.Multi",
        ),
        (lambda: split_attention_(nn.Sequential(nn.Linear(2, 2))), ValueError, "targets"),
        (lambda: split_attention_(3), TypeError, "model"),
        (lambda: SplitAttention(attention())(*inputs(attention(), True), is_causal=True), ValueError, "pass that too"),
        (lambda: SplitAttention(attention()).in_proj_weight + 1, TypeError, "cannot compute __add__"),
    ]
    for wrong, kind, message in cases:
        with pytest.raises(kind, match=message):
            wrong()


def test_sharing_dtype_device_and_frozen_parameters_are_kept():
    made = attention().to(torch.bfloat16)
    made.requires_grad_(False)
    model = split_attention_(nn.ModuleDict({"a": made, "b": made}))
    assert model["a"] is model["b"] and model["a"].q_proj.weight.dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in model.parameters())
