"""LoRA of PEFT on top of sparse layers."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch

import sparsekern as sk

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from sparsekern.integrations.peft import SparseLora, with_sparse_layers  # noqa: E402
from tests.integrations.transformers.models import build, logits  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
TARGETS = ["c_attn", "c_fc"]


def adapted(**options) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A sparse GPT-2 and a LoRA model of a copy of it."""
    model = sk.sparsify_(build("gpt2"), 0.5, 8)
    config = peft.LoraConfig(r=4, target_modules=TARGETS, **({"init_lora_weights": False} | options))
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return model, peft.get_peft_model(copy.deepcopy(model), with_sparse_layers(config)).eval()


def test_it_is_the_sparse_layer_plus_the_low_rank_update():
    model, lora = adapted()
    layer = lora.base_model.model.transformer.h[0].mlp.c_fc
    assert type(layer) is SparseLora and type(layer.base_layer) is sk.SparseLinear
    x = torch.randn(3, 32)
    low = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
    expected = model.transformer.h[0].mlp.c_fc(x) + x @ low.T
    torch.testing.assert_close(layer(x), expected)
    with lora.disable_adapter():
        assert torch.equal(logits(lora), logits(model))


def test_only_the_adapter_trains_and_comes_back(tmp_path: Path):
    model, lora = adapted(init_lora_weights=True)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=0.01)
    ids = torch.arange(2, 18).view(2, 8)
    losses = []
    for _ in range(8):
        losses.append(lora(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    for key, value in before.items():
        name = "base_model.model." + key
        for target in TARGETS:
            name = name.replace(f"{target}.", f"{target}.base_layer.")
        assert torch.equal(lora.state_dict()[name], value)
    lora.save_pretrained(tmp_path)
    config = with_sparse_layers(peft.PeftConfig.from_pretrained(tmp_path))
    again = peft.PeftModel.from_pretrained(model, tmp_path, config=config)
    assert torch.equal(logits(again), logits(lora))


def test_what_it_cannot_do_is_one_sentence():
    _, lora = adapted()
    with pytest.raises(ValueError, match="cannot be merged into the blocks: call sparsekern.densify_"):
        lora.merge_and_unload()
    olora = peft.LoraConfig(init_lora_weights="olora")
    cases = [
        (TypeError, "config is a int; it must be a peft.LoraConfig", lambda: with_sparse_layers(3)),
        (ValueError, "use_dora computes", lambda: with_sparse_layers(peft.LoraConfig(use_dora=True))),
        (ValueError, "init_lora_weights is 'olora'", lambda: with_sparse_layers(olora)),
    ]
    for kind, message, wrong in cases:
        with pytest.raises(kind, match=message):
            wrong()
    with pytest.raises(ValueError, match="SparseLinear.*is not supported"):  # PEFT itself, without with_sparse_layers
        peft.get_peft_model(sk.sparsify_(build("gpt2"), 0.5, 8), peft.LoraConfig(target_modules=TARGETS))
