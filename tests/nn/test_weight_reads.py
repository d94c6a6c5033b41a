"""Which modules read a child's weight in their forward."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsekern as sk
from sparsekern.nn.dense_layers import readers


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


CASES = [
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


@pytest.mark.parametrize(("kind", "found"), CASES, ids=lambda case: getattr(case, "__name__", ""))
def test_who_reads(kind, found):
    assert readers(nn.ModuleDict({"a": kind()})) == {f"a.{name}": method for name, method in found.items()}


class OwnEncoderLayer(nn.TransformerEncoderLayer):
    def forward(self, src: Tensor, *args, **kwargs) -> Tensor:
        return super().forward(src, *args, **kwargs)


def test_a_subclass_that_calls_super_reads_what_its_base_reads():
    """In evaluation PyTorch's encoder layer takes a fast path, which computes with the weights of its children."""
    own, base = (kind(16, 2, 32) for kind in (OwnEncoderLayer, nn.TransformerEncoderLayer))
    assert readers(own).keys() == readers(base).keys() > {"linear1", "linear2", "self_attn.out_proj"}


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
