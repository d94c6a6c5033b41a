"""States as other libraries write them: under prefixes of wrappers, with pruning masks, in several files."""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsekern.errors import InputError

logger = logging.getLogger("sparsekern")

ORIGINAL, MASK = "_orig", "_mask"
"""What PyTorch's pruning adds to the name of a parameter: it has two entries, whose product it is."""

LARGEST_INDEX = 2**26
"""Bytes of the index of a state in several files; that of the largest published models has a tenth of it."""


def without_compile(name: str) -> str:
    """Return a name in a state without what ``torch.compile`` adds to the names of compiled modules."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def merge_pruned(state: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
    """Return the state with ``<name>`` in the place of each ``<name>_orig`` and ``<name>_mask`` of PyTorch's pruning.

    Raises:
        ValueError: the two have different shapes.
    """
    merged: OrderedDict[str, Tensor] = OrderedDict()
    for key, tensor in state.items():
        whole = key.removesuffix(ORIGINAL)
        mask = state.get(whole + MASK) if whole != key else None
        if isinstance(tensor, Tensor) and isinstance(mask, Tensor) and whole not in state:
            if mask.shape != tensor.shape:
                raise InputError(
                    f"{key} has shape {tuple(tensor.shape)} and {whole}{MASK} {tuple(mask.shape)}; a mask of pruning "
                    "has the shape of what it masks",
                    parameter=key,
                )
            merged[whole] = tensor * mask.to(tensor.dtype)
        elif not (key.endswith(MASK) and key.removesuffix(MASK) + ORIGINAL in state):
            merged[key] = tensor
    if hasattr(state, "_metadata"):
        merged._metadata = state._metadata  # type: ignore[attr-defined]
    return merged


def shared_prefix(keys: list[str], wanted: set[str]) -> str:
    """Return the prefix that all keys share and without which they lie in modules of a model; empty if there is none.

    Args:
        keys: names in a state.
        wanted: names of the modules of the model that have parameters or buffers.
    """
    prefix, rest = "", list(keys)
    while rest and not wanted & {key.rpartition(".")[0] for key in rest}:
        first = rest[0].partition(".")[0] + "."
        if not all(key.startswith(first) and len(key) > len(first) for key in rest):
            return ""
        prefix, rest = prefix + first, [key.removeprefix(first) for key in rest]
    return prefix if rest else ""


def read_index(path: Path, read: Callable[[Path], Mapping[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a state in several files, and its metadata, from the index that Transformers writes.

    Args:
        path: ``model.safetensors.index.json`` or ``pytorch_model.bin.index.json``; the files lie beside it.
        read: reads one of them.

    Raises:
        ValueError: it is no such index, or a tensor is not where it says.
    """
    try:
        if path.stat().st_size > LARGEST_INDEX:
            raise ValueError
        weight_map = json.loads(path.read_bytes())["weight_map"]
        files = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(
            f"{path} is no index of a state in several files, which has an entry weight_map; give a file of weights"
        ) from None
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, Any] = {}
    for file in sorted(set(files.values())):
        if Path(file).name != file or file.endswith(".json"):
            raise InputError(f"{path} names the file {file!r}; its files must be files of weights beside it")
        part = read(path.with_name(file))
        absent = [name for name, where in files.items() if where == file and name not in part]
        if absent:
            raise InputError(f"{path.with_name(file)} has no tensor {absent[0]!r}, which {path.name} names")
        tensors |= {name: part[name] for name, where in files.items() if where == file}
        metadata |= getattr(part, "_metadata", {})
    return tensors, metadata
