"""A model of Transformers as a plan needs it: built from its configuration on the meta device, without any weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from sparsekern.analysis.plan import Step
from sparsekern.errors import InputError
from sparsekern.nn import sparsify_

CLIP_NORM = 1.0


@dataclass(frozen=True)
class PlannedModel:
    """A causal language model that is trained by AdamW.

    Attributes:
        config: of the model.
        sparsity: fraction of the sparse layers' weights that is absent, or ``{selector: sparsity}``.
        block_size: side of the blocks.
        texts, tokens: of a pass on one device.
        dtype: in which autocast computes, or None.
    """

    config: PreTrainedConfig
    sparsity: float | Mapping[str, float]
    block_size: int
    texts: int
    tokens: int
    dtype: torch.dtype | None = None

    @property
    def depth(self) -> int:
        """The number of layers."""
        return int(self.config.num_hidden_layers)

    def scaled(self, depth: int) -> PlannedModel:
        """Return the model with another number of layers."""
        values = self.config.to_dict() | {"num_hidden_layers": depth}
        values.pop("layer_types", None)  # one entry a layer; the configuration fills it in
        return replace(self, config=type(self.config).from_dict(values))

    def step(self, network: str) -> Step:
        """Return a pass of a device.

        Args:
            network: ``"sparse"`` or ``"dense"``; embeddings and the head stay dense in both.

        Raises:
            ValueError: the configuration is of no causal language model, or the sparsity leaves a layer without blocks.
        """
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32)
        except (ValueError, TypeError, AttributeError) as error:
            kind = type(self.config).__name__
            words = str(error).splitlines()[0]
            raise _wrong(f"a {kind}, of which no causal language model can be built: {words}") from None
        if network == "sparse":
            heads = [name for name, module in model.named_modules() if module is model.get_output_embeddings()]
            sparsify_(model, self.sparsity, self.block_size, ignore=heads)
        texts = torch.empty(self.texts, self.tokens, dtype=torch.int64, device="meta")
        return Step(model, texts, _loss, _adamw, CLIP_NORM, self.dtype)


def _loss(model: nn.Module, texts: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=texts, labels=texts, use_cache=False).loss
    return loss


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), fused=True)


def read_config(path: Path) -> PreTrainedConfig:
    """Read the configuration of a model from a file, or from a folder with ``config.json``; nothing is downloaded.

    Raises:
        ValueError: there is no such file, it is not JSON, or of no model that Transformers knows.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise _wrong(f"{path}, where there is no {file.name}; give a file or a folder")
    try:
        values: Any = json.loads(file.read_text())
    except ValueError:
        raise _wrong(f"{file}, which is not JSON; give the config.json of a model") from None
    if not isinstance(values, dict) or "model_type" not in values:
        raise _wrong(f"{file}, which names no model_type; give the config.json of a model")
    values.pop("quantization_config", None)
    try:
        config: PreTrainedConfig = AutoConfig.for_model(values.pop("model_type"), **values)
    except (ValueError, TypeError) as error:
        words = str(error).splitlines()[0].partition(". ")[0]
        raise _wrong(f"{file}, of which Transformers makes no model: {words}") from None
    return config


def _wrong(what: str) -> InputError:
    return InputError(f"config is {what}", parameter="config")
