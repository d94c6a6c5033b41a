"""Layers that must stay dense are refused with the reason."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.nn.dense_layers import left_dense, refusals


class Subclass(nn.Linear):
    pass


class ConvSubclass(nn.Conv2d):
    pass


def tied() -> nn.Module:
    model = nn.ModuleDict({"embed": nn.Embedding(8, 4), "head": nn.Linear(4, 8, bias=False)})
    model["head"].weight = model["embed"].weight
    return model


def tied_bias() -> nn.Module:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "head": nn.Linear(4, 4)})
    model["head"].bias = model["a"].bias
    return model


def shared() -> nn.Module:
    layer = nn.Linear(4, 4)
    return nn.ModuleDict({"a": layer, "head": layer})


def parametrized() -> nn.Module:
    return nn.ModuleDict({"head": torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))})


def buffered() -> nn.Module:
    model = nn.ModuleDict({"head": nn.Linear(4, 4)})
    model["head"].register_buffer("scale", torch.ones(1))
    return model


def hooked_by_accelerate() -> nn.Module:
    model = nn.ModuleDict({"head": nn.Linear(4, 4)})
    model["head"].forward = lambda x: x
    return model


def old_weight_norm() -> nn.Module:
    model = nn.ModuleDict({"head": nn.Linear(4, 4)})
    model["head"].weight_g = nn.Parameter(torch.ones(4, 1))
    return model


CASES = [
    (lambda: nn.ModuleDict({"head": nn.Linear(4, 4)}), "head", None),
    (tied, "head", "its weight is shared: embed.weight, head.weight"),
    (tied_bias, "head", "its bias is shared: a.bias, head.bias"),
    (shared, "head", "its weight is shared: a.weight, head.weight"),
    (lambda: nn.ModuleDict({"head": Subclass(4, 4)}), "head", "it is a Subclass, which may do more"),
    (lambda: nn.ModuleDict({"head": ConvSubclass(4, 4, 3)}), "head", "it is a ConvSubclass, which .* than nn.Conv2d"),
    (lambda: nn.ModuleDict({"head": nn.Conv2d(4, 4, 3)}), "head", None),
    (parametrized, "head", "it is a ParametrizedLinear"),
    (old_weight_norm, "head", r"its weight is computed from other tensors \(weight_g\)"),
    (buffered, "head", r"it has buffers of its own, which would be lost \(scale\)"),
    (hooked_by_accelerate, "head", "its forward is replaced on the instance"),
    (lambda: nn.MultiheadAttention(4, 2), "out_proj", "nn.MultiheadAttention.forward reads its weight"),
    (lambda: nn.TransformerEncoderLayer(4, 2), "linear1", "nn.TransformerEncoderLayer.forward reads its weight"),
    (lambda: nn.TransformerDecoderLayer(4, 2), "self_attn.out_proj", "nn.MultiheadAttention.forward reads its weight"),
    (lambda: nn.TransformerEncoderLayer(4, 2), "self_attn.out_proj", "nn.TransformerEncoderLayer.forward reads its"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "name", "reason"), CASES, ids=[str(c[2])[:30] for c in CASES])
def test_reasons(make, name, reason):
    model = make()
    if reason is None:
        assert refusals(model, {name: model.get_submodule(name)}) == {}
        return
    before = repr(model)
    with pytest.raises(ValueError, match=f"cannot be made sparse: .*{name}: {reason}.*ignore=\\["):
        sk.sparsify_(model, 0.5, 2)
    assert repr(model) == before


def test_the_ignore_list_of_the_error_works():
    model = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8), nn.Linear(4, 4))
    ignore = ["0.self_attn.out_proj", "0.linear1", "0.linear2"]
    with pytest.raises(ValueError, match=str(ignore).replace("[", r"\[").replace("]", r"\]")):
        sk.sparsify_(model, 0.5, 2)
    sk.sparsify_(model, 0.5, 2, ignore=ignore)
    assert isinstance(model[1], sk.SparseLinear)
    model.eval()(torch.ones(1, 3, 4))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Conv2d(3, 64, 7), "stem"),
        (lambda: nn.Conv2d(1, 8, 3), "stem"),
        (lambda: nn.Conv2d(4, 64, 7), None),
        (lambda: nn.Conv2d(32, 32, 3, groups=32), "depthwise"),
        (lambda: nn.Conv2d(32, 64, 3, groups=32), "depthwise"),
        (lambda: nn.Conv2d(32, 64, 3, groups=16), None),
        (lambda: nn.Linear(3, 3), None),
        (lambda: nn.LazyConv2d(8, 3), None),
    ],
)
def test_convolutions_that_stay_dense(make, reason):
    assert left_dense(make()) == reason
