"""What stays dense in a model is said where its sparsity is said."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.nn import dense_share


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


def test_gpt2_says_that_its_layers_are_conv1d():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=40, n_positions=16)
    model = transformers.GPT2LMHeadModel(config)
    expected = r"Conv1D \(8 layers such as 'transformer.h.0.attn.c_attn', \d+% of the parameters, not one of these\)"
    with pytest.raises(ValueError, match=f"lm_head: its weight is shared: .*nothing to make sparse.*{expected}"):
        sk.sparsify_(model, 0.9, 8)
    with pytest.raises(ValueError, match=f"sparsify_ takes nn.Linear.*register_converter.*{expected}.*nn.Embedding"):
        sk.sparsify_(model, 0.9, 8, ignore="lm_head")


def test_a_model_of_other_convolutions_says_what_can_be_sparse_and_what_came_nearest():
    model = nn.Sequential(nn.Conv3d(4, 8, 3), nn.Conv3d(8, 8, 3), nn.BatchNorm3d(8))
    with pytest.raises(ValueError) as error:
        sk.sparsify_(model)
    text = str(error.value)
    assert "nothing is left to make sparse (sparse already: none). sparsify_ takes nn.Linear, nn.Conv2d" in text
    assert "nn.Conv3d (2 layers such as '0', 99% of the parameters, not one of these)" in text
