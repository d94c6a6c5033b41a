"""Hugging Face Transformers: sparse models in its files, its Trainer and its models.

Importing this registers the format of sparse models with Transformers, so that ``from_pretrained`` knows it, and
GPT-2's ``Conv1D`` with :func:`sparsekern.sparsify_`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparsekern.integrations.transformers.files import SparseConfig, SparseQuantizer, model_card, settle
from sparsekern.nn import SparseLinear, register_converter
from sparsekern.nn.dense_layers import SPARED

if TYPE_CHECKING:
    from sparsekern.integrations.transformers.training import SparseCallback, SparseTrainer

__all__ = [
    "SparseCallback",
    "SparseConfig",
    "SparseQuantizer",
    "SparseTrainer",
    "model_card",
    "settle",
    "stays_dense",
]


def __getattr__(name: str) -> Any:
    """Import the Trainer, which takes seconds and needs accelerate, where it is asked for."""
    if name in ("SparseCallback", "SparseTrainer"):
        from sparsekern.integrations.transformers import training

        return getattr(training, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register_layers() -> None:
    """Teach :func:`sparsekern.sparsify_` the ``Conv1D`` of GPT-2, a linear layer whose weight is ``(in, out)``.

    And which weights Bloom reads only where it imitates the tensor parallelism of its training.
    """

    def arguments(layer: Any) -> dict[str, Any]:
        in_features, out_features = layer.weight.shape
        return {"in_features": in_features, "out_features": out_features}

    register_converter(
        Conv1D,
        SparseLinear,
        arguments,
        rebuild=lambda layer: Conv1D(layer.out_features, layer.in_features),
        transposed=True,
    )

    def spare(child: str) -> Callable[[Any], set[str]]:
        return lambda module: set() if module.pretraining_tp > 1 and module.slow_but_exact else {child}

    for name, child in (("BloomAttention", "dense"), ("BloomMLP", "dense_4h_to_h")):
        SPARED[f"transformers.models.bloom.modeling_bloom.{name}"] = spare(child)


def stays_dense(model: nn.Module) -> dict[str, str]:
    """Return the heads that Transformers ties to an embedding, by name, with what to say.

    On the meta device it has not tied them yet, but says that it will.
    """
    return {
        f"{prefix}.{tied}".lstrip(".").removesuffix(".weight"): f"its weight is tied to {source!r}"
        for prefix, module in model.named_modules()
        if isinstance(module, PreTrainedModel)
        for tied, source in getattr(module, "all_tied_weights_keys", {}).items()
        if tied.endswith(".weight")
    }


register_layers()
