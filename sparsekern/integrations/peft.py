"""LoRA of PEFT on top of sparse layers."""

from __future__ import annotations

import warnings
from typing import Any

from peft import LoraConfig
from peft.tuners import lora

from sparsekern.errors import InputError
from sparsekern.nn import SparseLinear

__all__ = ["SparseLora", "with_sparse_layers"]

MERGE = (
    "a low-rank update of a sparse layer is dense, so it cannot be merged into the blocks: call sparsekern.densify_ on "
    "the base model before get_peft_model, or keep the adapter apart"
)


class SparseLora(lora.Linear):
    """A LoRA layer around a :class:`sparsekern.SparseLinear`, which computes and stays sparse. It does not merge."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Unsupported layer type")  # PEFT finds the sizes all the same
            super().__init__(*args, **kwargs)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Raise ValueError, with the way out."""
        raise InputError(MERGE)


def with_sparse_layers(config: LoraConfig) -> LoraConfig:
    """Register sparse layers with a LoRA config, by PEFT's own registration of layers; returns the config.

    ::

        model = get_peft_model(model, with_sparse_layers(LoraConfig(r=8, target_modules=["c_attn"])))

    Their blocks are frozen, as the weights of dense layers are, so that no training method moves them. To load an
    adapter give its config: ``PeftModel.from_pretrained(model, folder, config=with_sparse_layers(config))``.

    Raises:
        TypeError: the config is not one of LoRA.
        ValueError: a variant that computes with the dense weight (DoRA), or initialises from it.
    """
    if not isinstance(config, LoraConfig):
        raise TypeError(f"config is a {type(config).__name__}; it must be a peft.LoraConfig")
    if config.use_dora:
        raise InputError("use_dora computes with the norm of the dense weight; leave it out", parameter="config")
    if config.init_lora_weights not in (True, False, "gaussian", "orthogonal"):
        raise InputError(
            f"init_lora_weights is {config.init_lora_weights!r}, which reads the dense weight; use True or 'gaussian'",
            parameter="config",
        )
    config._register_custom_module({SparseLinear: SparseLora})
    return config
