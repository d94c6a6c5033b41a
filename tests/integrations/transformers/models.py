"""Small models of Transformers from configs: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TOKENS = {"vocab_size": 48, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def gpt2(**options: Any) -> nn.Module:
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 32, "vocab_size": 48}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, pad_token_id=0, **options)
    return transformers.GPT2LMHeadModel(config)


def bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, **TOKENS, max_position_embeddings=32))


def llama() -> nn.Module:
    config = transformers.LlamaConfig(**SIZES, **TOKENS, num_key_value_heads=1)
    return transformers.LlamaForCausalLM(config)


def qwen3() -> nn.Module:
    config = transformers.Qwen3Config(**SIZES, **TOKENS, num_key_value_heads=1, head_dim=16, tie_word_embeddings=True)
    return transformers.Qwen3ForCausalLM(config)


def t5() -> nn.Module:
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "vocab_size": 48}
    config = transformers.T5Config(**sizes, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(config)


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(**SIZES, **TOKENS, num_key_value_heads=1, num_local_experts=4)
    return transformers.MixtralForCausalLM(config)


def bloom(**options: Any) -> nn.Module:
    sizes = {"hidden_size": 32, "n_layer": 2, "n_head": 2, "vocab_size": 48}
    return transformers.BloomForCausalLM(transformers.BloomConfig(**sizes, **options))


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES, image_size=16, patch_size=8))


def resnet() -> nn.Module:
    config = transformers.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic")
    return transformers.ResNetForImageClassification(config)


TEXT: dict[str, Callable[[], nn.Module]] = {
    "gpt2": gpt2,
    "bert": bert,
    "llama": llama,
    "qwen3": qwen3,
    "mixtral": mixtral,
    "t5": t5,
    "bloom": bloom,
}
MODELS: dict[str, Callable[[], nn.Module]] = TEXT | {"vit": vit, "resnet": resnet}


def build(name: str) -> nn.Module:
    """A dense model with the same weights each time, in evaluation mode."""
    torch.manual_seed(0)
    return MODELS[name]().eval()


def logits(model: nn.Module) -> torch.Tensor:
    """What a model answers to one fixed batch."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        if hasattr(model.config, "image_size") or model.config.model_type == "resnet":
            image = torch.randn(2, 3, 16, 16, generator=generator, dtype=torch.float32)
            return model(pixel_values=image.to(model.device, model.dtype)).logits
        ids = torch.randint(2, 48, (2, 9), generator=generator).to(model.device)
        more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        return model(input_ids=ids, **more).logits
