"""Sparse models in the files of Transformers: a quantization config that names the layers, and its quantizer.

Those are the library's extension points for layers that are not ``nn.Linear``. ``config.json`` says which layers are
sparse, in what blocks and with how many slots; the files of weights hold ``values``, ``row`` and ``col`` of each.
"""

from __future__ import annotations

import json
import re
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sparsekern.errors import InputError
from sparsekern.files.weight_files import ENTRY, FORMAT_VERSION
from sparsekern.nn import BlockSparse, dense_share, densify_, sparse_layers, sparsify_
from sparsekern.nn.converters import converter_of, known_classes
from sparsekern.nn.surgery import swap_

FORMAT = "sparsekern"
"""Name of the format in ``config.json``."""

VERSION = 1

TAGS = ["sparsekern", "block-sparse"]


@register_quantization_config(FORMAT)
class SparseConfig(QuantizationConfigMixin):
    """How a model of Transformers is sparse: in ``config.json`` of one that is, or as a wish for a dense one.

    ``from_pretrained`` of a folder with a sparse model needs none; the folder says everything. To make a dense
    checkpoint sparse as it is loaded, keeping its strongest blocks::

        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=SparseConfig(sparsity=0.8))

    Args:
        layers: what a saved model has, by the name of the layer; written by ``save_pretrained``.
        version: of that entry.
        options: arguments of :func:`sparsekern.sparsify_` for a dense checkpoint, with ``init="norm"`` by default.

    Raises:
        ValueError: a version that this code does not read, or damaged entries.
    """

    def __init__(
        self, *, layers: dict[str, dict[str, Any]] | None = None, version: int = VERSION, **options: Any
    ) -> None:
        options.pop("quant_method", None)
        if version != VERSION:
            raise InputError(
                f"the model was saved in version {version!r} of the format {FORMAT!r}; this sparsekern reads {VERSION}"
            )
        if layers is not None:
            for name, described in layers.items():
                _check_described(name, described)
        self.quant_method: Any = FORMAT
        self.version = version
        self.layers = layers
        self.options = options

    def to_dict(self) -> dict[str, Any]:
        """Return what ``config.json`` holds."""
        written: dict[str, Any] = {"quant_method": FORMAT, "version": self.version}
        return written | ({} if self.layers is None else {"layers": self.layers}) | self.options


def _check_described(name: str, described: Any) -> None:
    block, slots = (described.get(key) for key in ("block_size", "slots")) if isinstance(described, dict) else (0, 0)
    sides = block if isinstance(block, list) and len(block) == 2 else [0]
    if any(type(size) is not int or size < 1 for size in (*sides, slots)):
        raise InputError(
            f"config.json describes the sparse layer {name!r} as {described!r}; it must be block_size: [out, in] and "
            "slots: a number, as save_pretrained writes them"
        )


@register_quantizer(FORMAT)
class SparseQuantizer(HfQuantizer):
    """Builds sparse layers before ``from_pretrained`` fills them, and describes them in ``save_pretrained``.

    The model counts as quantized nowhere else: it trains, casts and compiles as any other.
    """

    requires_calibration = False
    is_trainable = True
    is_qat_trainable = True
    is_compileable = True

    def is_serializable(self) -> bool:
        """Return True: sparse models are saved as they are."""
        return True

    quantization_config: SparseConfig

    def preprocess_model(self, model: PreTrainedModel, dtype: Any = None, **kwargs: Any) -> None:
        """Put sparse layers, on the meta device, in the places of dense ones."""
        super().preprocess_model(model, dtype=dtype, **kwargs)
        del model.is_quantized, model.quantization_method  # else .half() and .float() raise

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if self.quantization_config.layers is None:
            if self.pre_quantized:
                raise InputError("config.json names the format sparsekern but no layers; save the model anew")
            return
        _check_files(kwargs.get("checkpoint_files") or [])
        placed = place_(model, self.quantization_config.layers)
        ignored = {*(model._keys_to_ignore_on_load_unexpected or ()), *(re.escape(f"{n}.weight") for n in placed)}
        model._keys_to_ignore_on_load_unexpected = ignored  # of this instance; the class keeps its own

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        model.__dict__.pop("_keys_to_ignore_on_load_unexpected", None)
        if self.quantization_config.layers is None:
            sparsify_(model, **({"init": "norm"} | self.quantization_config.options))
        else:
            for layer in sparse_layers(model).values():
                layer.refresh_()  # says what is wrong with the places in the file
            settle(model)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[Any, dict[str, str]]:
        """Bring the config up to date, and return the state to write.

        It holds an empty ``weight`` of one sparse layer. A reader that does not know the format then fails by its
        shape; else it would draw a dense model from its random numbers, with a mere warning.
        """
        sparse = sparse_layers(model)
        if not sparse:  # densified since
            self.remove_quantization_config(model)
            return None, {}
        self.quantization_config = SparseConfig(layers={name: _described(layer) for name, layer in sparse.items()})
        model.config.quantization_config = self.quantization_config
        first, layer = next(iter(sparse.items()))
        state: Any = model.state_dict()
        entry = {"format_version": FORMAT_VERSION, "layers": {name: state._metadata[name]["grid"] for name in sparse}}
        return state | {f"{first}.weight": layer.values.new_empty(0)}, {ENTRY: json.dumps(entry)}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        densify_(model)
        if dtype is not None:
            nn.Module.to(model, dtype)
        return model


def _check_files(paths: list[str]) -> None:
    """Raise ValueError if files hold the weights of a dense model, as a config copied from a sparse one claims not."""
    names: set[str] = set()
    for path in paths:
        if not path.endswith(".safetensors"):
            return
        with safe_open(path, framework="pt") as file:
            names.update(file.keys())
    if paths and not any(name.endswith(".values") for name in names):
        raise InputError(
            "config.json says that layers are sparse, but the files hold the weights of a dense model; remove "
            "quantization_config from config.json"
        )


def _described(layer: BlockSparse) -> dict[str, Any]:
    described = {"block_size": list(layer.block_size), "slots": layer.values.shape[0]}
    return described | ({"tie_taps": True} if layer.tie_taps else {})


def place_(model: PreTrainedModel, layers: dict[str, dict[str, Any]]) -> list[str]:
    """Put empty sparse layers in the places of dense ones, for a checkpoint to fill.

    Args:
        model: changed in place. It may be another one than was saved, with another head or none: names are found with
            the prefix of the base model and without, and layers that it lacks are left out.
        layers: what was saved, by the name of the layer.

    Returns:
        The names of the layers in the model.

    Raises:
        ValueError: a layer is of a class that cannot be sparse, or the model has none of the layers.
    """
    placed = []
    for saved, described in layers.items():
        if (name := name_in(model, saved)) is None:
            continue
        dense: Any = model.get_submodule(name)
        placed.append(name)
        slots = described["slots"]
        if isinstance(dense, BlockSparse):  # the model's own __init__ made it sparse
            if _described(dense) != described:
                raise InputError(f"{name!r} is sparse otherwise in the model's code than in config.json: {described}")
            continue
        if (converter := converter_of(dense)) is None:
            raise InputError(
                f"config.json says that {name!r} is sparse, in the model it is a {type(dense).__name__}; it must be "
                f"one of {known_classes()}"
            )
        options = {"tie_taps": True} if described.get("tie_taps") else {}
        kind: Any = converter.sparse  # whose options are those of its class
        twin = kind(
            **converter.arguments(dense),
            block_size=tuple(described["block_size"]),
            blocks=slots,
            name=name,
            seed=0,
            device=dense.weight.device,
            dtype=dense.weight.dtype,
            **options,
        )
        twin.set_dense_class(dense)
        twin.values._is_hf_initialized = True  # what stays on the disk is not to be drawn either
        swap_(model, name, twin)
    if not placed:
        raise InputError(
            f"config.json names sparse layers such as {next(iter(layers))!r}, of which {type(model).__name__} has none"
        )
    return placed


def name_in(model: PreTrainedModel, saved: str) -> str | None:
    """Return the name in a model of what was saved from it, or from one with another head or none; else None."""
    prefix = f"{model.base_model_prefix}."
    for name in (saved, saved.removeprefix(prefix), prefix + saved):
        try:
            model.get_submodule(name)
        except AttributeError:
            continue
        return name
    return None


def settle(model: nn.Module) -> None:
    """Make every model of Transformers inside a model save its sparse layers as such.

    :func:`sparsekern.sparsify_` calls this. Nothing of a class is changed: only what its instances know.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and any(isinstance(part, BlockSparse) for part in module.modules()):
            note: Any = module
            note.hf_quantizer = SparseQuantizer(SparseConfig(layers={}), pre_quantized=True)
            module.config._is_quantized = True  # asked where attention looks for an nn.Linear to read a dtype from
            module.add_model_tags(TAGS)


def model_card(model: PreTrainedModel, name: str = "model") -> str:
    """Return the text of a README.md for the folder of a sparse model: how to load it, and what is sparse.

    Args:
        model: with sparse layers.
        name: what ``from_pretrained`` is given: the name of the repository, or a folder.

    Raises:
        ValueError: the model has no sparse layer.

    Example::

        model.save_pretrained(folder)
        Path(folder, "README.md").write_text(model_card(model))
    """
    sparse = sparse_layers(model)
    if not sparse:
        raise InputError("the model has no sparse layer, so there is nothing for the card to say")
    share = dense_share(model)
    stored = sum(layer.values.numel() for layer in sparse.values())
    dense = sum(layer.grid.numel for layer in sparse.values())
    kinds: dict[tuple[Any, ...], int] = {}
    for layer in sparse.values():
        (out, ins), (bo, bi) = (layer.grid.out_features, layer.grid.in_features), layer.block_size
        key = (f"{out} x {ins}", f"{bo} x {bi}", f"{layer.sparsity:.1%}")
        kinds[key] = kinds.get(key, 0) + 1
    rows = "\n".join(f"| {many} | {size} | {block} | {absent} |" for (size, block, absent), many in kinds.items())
    absent = f"{1 - stored / dense:.1%} of their {dense:,} weights are absent"
    auto = f"{type(model).__module__.partition('.')[0]} import {type(model).__name__}"
    return f"""---
library_name: transformers
tags:
{chr(10).join(f"- {tag}" for tag in TAGS)}
---

# {name}

A {type(model).__name__} with block-sparse layers: {absent}, from the files, from memory and from the
computation. {share}.

```python
import sparsekern.integrations.transformers  # pip install sparsekern[transformers]
from {auto}

model = {type(model).__name__}.from_pretrained("{name}")
```

| layers | weight (out x in) | block | absent |
|---|---|---|---|
{rows}
"""
