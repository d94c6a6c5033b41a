"""Plans of models that a configuration of Transformers describes."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, ViTConfig

from sparsekern.analysis.plan import repeated_blocks, trace
from sparsekern.errors import InputError
from sparsekern.integrations.transformers.planned import PlannedModel, read_config
from sparsekern.nn import sparse_layers

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "vocab_size": 100}
LLAMA = LlamaConfig(**SIZES, num_key_value_heads=1, num_hidden_layers=3)
GPT2 = GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=100, n_positions=32)


def planned(config, **more) -> PlannedModel:
    return PlannedModel(config, **({"sparsity": 0.5, "block_size": 16, "texts": 2, "tokens": 32} | more))


@pytest.mark.parametrize("config", [LLAMA, GPT2])
def test_a_step_of_a_model(config):
    step = planned(config).step("sparse")
    assert all(p.is_meta for p in step.model.parameters())
    assert len(repeated_blocks(step.model)) == config.num_hidden_layers
    assert not any("head" in name for name in sparse_layers(step.model))
    sparse, dense = trace(step), trace(planned(config).step("dense"))
    assert 0 < sparse.flops < dense.flops


def test_products_of_a_llama_by_hand():
    found = trace(planned(LLAMA).step("dense"))
    tokens, width, hidden, vocabulary = 64, 64, 128, 100
    layer = 2 * width * width + 2 * width * width // 2 + 3 * width * hidden  # q, o; k, v with half the heads; the MLP
    attention = 2 * 2 * 2 * 32 * 32 * width
    forward = sum(op.flops * n for op, n in found.forward.items())
    assert forward == 2 * tokens * (3 * layer + width * vocabulary) + 3 * attention


def test_another_depth():
    assert planned(LLAMA).scaled(5).depth == 5
    assert len(repeated_blocks(planned(GPT2).scaled(4).step("dense").model)) == 4


def test_autocast_halves_what_products_read():
    half, full = (trace(planned(GPT2, dtype=dtype).step("dense")) for dtype in (torch.bfloat16, None))
    assert half.flops == full.flops
    assert half.saved < full.saved


def test_a_configuration_is_read_from_a_file_or_a_folder(tmp_path):
    LLAMA.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        assert read_config(path).to_dict() == LLAMA.to_dict()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "where there is no config.json; give a file or a folder"),
        ("{", "config.json, which is not JSON"),
        ("[]", "which names no model_type"),
        ('{"model_type": "no such model"}', "of which Transformers makes no model"),
    ],
)
def test_what_is_no_configuration(tmp_path, content, words):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=words) as caught:
        read_config(tmp_path)
    assert caught.value.parameter == "config"


def test_a_model_that_is_no_language_model():
    with pytest.raises(InputError, match="config is a ViTConfig, of which no causal language model can be built"):
        planned(ViTConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2)).step("dense")


def test_a_quantized_configuration_is_planned_as_it_was_before(tmp_path):
    values = json.loads(LLAMA.to_json_string()) | {"quantization_config": {"quant_method": "sparsekern", "version": 1}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert not hasattr(read_config(tmp_path), "quantization_config")
