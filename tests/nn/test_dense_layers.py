"""Layers that stay dense: which must and why, and the share of the parameters in them."""

from __future__ import annotations

import functools
import logging

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsekern as sk
from sparsekern.nn import dense_share
from sparsekern.nn.dense_layers import left_dense, readers, refusals


class Subclass(nn.Linear):
    pass


class ConvSubclass(nn.Conv2d):
    pass


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
    (lambda: OwnEncoderLayer(4, 2), "linear1", "OwnEncoderLayer.forward reads its weight"),
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
    ignore = ["0.self_attn.out_proj"]
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


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.inner = nn.ModuleDict({"fc": nn.Linear(4, 4)})

    def init_weights(self) -> None:
        self.fc.weight.data.zero_()


class Calls(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class AsksOnly(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.fc.weight.dtype).to(self.fc.weight.device) + self.fc.weight.size(0)
        if self.fc.weight is not None and isinstance(self.fc.weight, Tensor) and self.fc.weight.shape[0] > 1:
            x = x + 1
        return self.fc(x)


class Reads(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.fc.weight, self.fc.bias)


class ReadsInAMethod(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.slow(x)

    def slow(self, x: Tensor) -> Tensor:
        return x @ self.fc.weight.t()


class ReadsAGrandchild(Base):
    def __init__(self) -> None:
        super().__init__()
        self.middle = Calls()

    def forward(self, x: Tensor) -> Tensor:
        return self.middle.fc.weight @ x


class ReadsInALambda(Base):
    def forward(self, x: Tensor) -> Tensor:
        return sum((lambda: self.fc.weight * 2)() for _ in range(2)) + x


def logged(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


class ReadsBehindADecorator(Base):
    @logged
    def forward(self, input_states: Tensor) -> Tensor:
        return input_states @ self.fc.weight


class Overrides(Reads):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class CallsSuper(Reads):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class CallsSuperOfAMethod(ReadsInAMethod):
    def slow(self, x: Tensor) -> Tensor:
        return super().slow(x + 1)


READS = [
    (Calls, {}),
    (AsksOnly, {}),
    (Overrides, {}),
    (Reads, {"fc": "Reads.forward"}),
    (ReadsInAMethod, {"fc": "ReadsInAMethod.slow"}),
    (ReadsAGrandchild, {"middle.fc": "ReadsAGrandchild.forward"}),
    (ReadsInALambda, {"fc": "ReadsInALambda.forward"}),
    (CallsSuper, {"fc": "CallsSuper.forward"}),
    (CallsSuperOfAMethod, {"fc": "CallsSuperOfAMethod.slow"}),
    (ReadsBehindADecorator, {"fc": "ReadsBehindADecorator.forward"}),
]


@pytest.mark.parametrize(("kind", "found"), READS, ids=lambda case: getattr(case, "__name__", ""))
def test_who_reads(kind, found):
    assert readers(nn.ModuleDict({"a": kind()})) == {f"a.{name}": method for name, method in found.items()}


class OwnEncoderLayer(nn.TransformerEncoderLayer):
    def forward(self, src: Tensor, *args, **kwargs) -> Tensor:
        return super().forward(src, *args, **kwargs)


def test_a_subclass_that_calls_super_reads_what_its_base_reads():
    """In evaluation PyTorch's encoder layer takes a fast path, which computes with the weights of its children.

    It asks first whether one of the weights is special, which sparse ones are; its subclasses may not.
    """
    own, base = (kind(16, 2, 32) for kind in (OwnEncoderLayer, nn.TransformerEncoderLayer))
    assert readers(own).keys() > {"linear1", "linear2", "self_attn.out_proj"}
    assert readers(base).keys() == readers(own).keys() - {"linear1", "linear2"}
    sk.nn.split_attention_(nn.ModuleDict({"a": base}))
    assert "self_attn.out_proj" not in readers(base)


class Odd(Base):
    forward = functools.partial(lambda x: x)  # no function with code of its own


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_modules_without_code_to_search():
    """A scripted child, a forward that is no function, and a compiled module are looked at, and nothing is found."""
    model = nn.ModuleDict({"odd": Odd(), "script": torch.jit.script(nn.Sequential(nn.Tanh())), "fc": nn.Linear(8, 8)})
    assert readers(model) == {}
    sk.sparsify_(model, 0.5, 4, targets="fc")
    compiled = torch.compile(Reads(), backend="eager")
    assert readers(compiled) == {"_orig_mod.fc": "Reads.forward"}


def test_what_asks_only_runs_on_a_sparse_layer():
    model = sk.sparsify_(AsksOnly(), 0.5, 2)
    model(torch.ones(1, 4))


def test_refused_by_name_before_anything_changes():
    model = nn.Sequential(Reads(), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"0.fc: Reads.forward reads its weight instead of.*ignore=\['0.fc'"):
        sk.sparsify_(model, 0.5, 2)
    assert not sk.sparse_layers(model)
    sk.sparsify_(model, 0.5, 2, ignore="0.fc")(torch.ones(1, 4))


def test_mamba():
    pytest.importorskip("transformers")
    from transformers import MambaConfig, MambaModel

    model = MambaModel(MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=50, state_size=4))
    with pytest.raises(ValueError, match=r"layers.0.mixer.dt_proj: MambaMixer.\w+ reads its weight") as error:
        sk.sparsify_(model, 0.5, 8)
    names = str(error.value).split("pass ignore=")[1]
    sk.sparsify_(model, 0.5, 8, ignore=eval(names))
    assert list(sk.sparse_layers(model)) == ["layers.0.mixer.in_proj"]
    model(torch.arange(6).view(1, 6))


def test_models_that_call_their_layers_are_not_refused():
    pytest.importorskip("transformers")
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, T5Config, T5Model

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64, "num_attention_heads": 2}
    t5 = T5Config(d_model=32, d_ff=64, num_layers=1, num_heads=2, d_kv=16, feed_forward_proj="gated-gelu")
    for model in (BertModel(BertConfig(**sizes)), LlamaModel(LlamaConfig(**sizes)), T5Model(t5)):
        assert readers(model) == {}


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.zeros(4, 8, 32))

    def forward(self, x):
        return torch.einsum("ti,eij->tj", x, self.gate_up)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.fc = nn.Linear(8, 8, bias=False)
        self.experts = nn.ModuleList([Experts(), Experts()])
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.experts[0](self.fc(self.embed(x)))


def test_by_hand():
    share = dense_share(sk.sparsify_(Model(), 0.75, 4, ignore="head"))
    assert share.total == 80 + 64 + 2 * 1024 + 64 and share.parameters == share.total - 64
    assert [(g.what, g.first, g.modules, g.parameters) for g in share.groups] == [
        ("Experts.gate_up (3-dimensional)", "experts.0", 2, 2048),
        ("nn.Embedding (tied to head.weight)", "embed", 1, 80),
        ("nn.LayerNorm", "norm", 1, 64),
    ]
    assert str(share) == (
        "97.2% of the model's 2,256 parameters stay dense: 90.8% in Experts.gate_up (3-dimensional), "
        "3.5% in nn.Embedding (tied to head.weight), 2.8% in nn.LayerNorm"
    )


def test_a_model_that_is_sparse_throughout_and_one_that_is_empty():
    assert str(dense_share(nn.Sequential(sk.SparseLinear(8, 8, block_size=4, sparsity=0.5)))).startswith("0.0% of")
    assert str(dense_share(nn.Identity())) == "0.0% of the model's 0 parameters stay dense"


def test_it_is_logged_and_in_the_summary(caplog):
    with caplog.at_level("INFO", logger="sparsekern"):
        model = sk.sparsify_(Model(), 0.75, 4, ignore="head")
    assert caplog.messages[-1].startswith("97.2% of the model's 2,256 parameters stay dense")
    line = str(sk.summary(model)).splitlines()[-1]
    assert line.startswith("sparse layers: 75.0% absent; all weights of the network: 2.2% absent; 97.2% of the model's")


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe"])
def test_experts_of_transformers(name):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 40, "head_dim": 16}
    sizes |= {"num_local_experts": 8} if name == "Mixtral" else {"num_experts": 8, "moe_intermediate_size": 64}
    config = getattr(transformers, f"{name}Config")(**sizes)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    sk.sparsify_(model, 0.9, 8)
    share = dense_share(model)
    assert share.fraction > 0.8
    assert "Experts" in share.groups[0].what and "3-dimensional" in share.groups[0].what


def test_a_head_that_is_tied_to_its_embedding_is_left_dense_and_said(caplog):
    model = nn.ModuleDict(
        {"embed": nn.Embedding(8, 16), "body": nn.Linear(16, 16), "head": nn.Linear(16, 8, bias=False)}
    )
    model["head"].weight = model["embed"].weight
    with caplog.at_level(logging.INFO, logger="sparsekern"):
        sk.sparsify_(model, 0.5, 4)
    assert list(sk.sparse_layers(model)) == ["body"] and model["head"].weight is model["embed"].weight
    assert "head: stays dense (its weight is tied to the embedding 'embed')" in caplog.text
    with pytest.raises(ValueError, match=r"every target is ignored.*nn.Linear \('head', .*tied to the embedding"):
        sk.sparsify_(model, 0.5, 4, targets="head")


def test_a_model_of_other_convolutions_says_what_can_be_sparse_and_what_came_nearest():
    model = nn.Sequential(nn.Conv3d(4, 8, 3), nn.Conv3d(8, 8, 3), nn.BatchNorm3d(8))
    with pytest.raises(ValueError) as error:
        sk.sparsify_(model)
    text = str(error.value)
    assert "nothing is left to make sparse (sparse already: none). sparsify_ takes nn.Linear, nn.Conv2d" in text
    assert "nn.Conv3d (2 layers such as '0', 99% of the parameters, not one of these)" in text
