"""Files of weights: safetensors, and what ``torch.save`` writes. Nothing in a file is ever executed."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsekern.errors import InputError
from sparsekern.files.atomic_files import replace
from sparsekern.files.foreign_states import read_index
from sparsekern.files.size_limits import DEFAULT, Limits, TooLarge
from sparsekern.files.torch_files import first_line, named_in_utf8, read_torch
from sparsekern.nn.layer_state import LAYER_VERSION, STORED, described_grid

FORMAT_VERSION = 2
"""Of a safetensors file with sparse layers. Version 2 says what matrices the blocks are of; 1 has no such entry."""

ENTRY = "sparsekern"
"""That entry in the metadata of a safetensors file."""

ZIP, PICKLE = b"PK\x03\x04", b"\x80"
"""How the files of ``torch.save`` begin: a zip archive since PyTorch 1.6, a bare pickle before."""

LONGEST_HEADER = 100_000_000
"""Bytes, of a safetensors file; its library reads no longer one."""

HEADER_BYTES = 200
"""Of a tensor in that header, about; most names are shorter than that allows."""

Metadata = dict[str, dict[str, Any]]
"""What ``load_state_dict`` hands on to each module, by its name."""


def metadata_of(state: Mapping[str, Tensor]) -> Metadata:
    """Return the metadata of a state, empty if it has none."""
    found = getattr(state, "_metadata", None)
    return {str(name): entry for name, entry in found.items()} if isinstance(found, dict) else {}


def with_metadata(tensors: Mapping[str, Tensor], metadata: Metadata) -> OrderedDict[str, Tensor]:
    """Return a state as ``module.state_dict()`` does: tensors by name, and metadata where torch expects them."""
    state = OrderedDict(tensors)
    state._metadata = metadata  # type: ignore[attr-defined]
    return state


def sparse_names(state: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the sparse layers in a state; the name of a layer that is the whole model is empty."""
    ends = (key.removesuffix("values") for key in state if key == "values" or key.endswith(".values"))
    return [end.removesuffix(".") for end in ends if all(end + part in state for part in STORED)]


def check_writable(path: Path, state: Mapping[str, Any]) -> None:
    """Check that a state holds tensors only, with numbers.

    Raises:
        ValueError: it does not; ``path`` is where it was to be written.
    """
    if other := [key for key, tensor in state.items() if not isinstance(tensor, Tensor)]:
        raise InputError(
            f"{path} cannot be written: {other[0]} is no tensor, and a file holds only those; leave it out"
        )
    if absent := [key for key, tensor in state.items() if tensor.is_meta]:
        raise InputError(
            f"{path} cannot be written: {absent[0]} is on the meta device, where tensors have no numbers; load or "
            "initialise the model first"
        )


def write_state(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write a state as safetensors, or with ``torch.save`` if the name ends in ``.pt`` or ``.pth``.

    The file is there whole or not at all; an older file, or a symbolic link, is replaced. What the state's metadata say
    about sparse layers is kept.

    Raises:
        ValueError: the file cannot be written.
        ModuleNotFoundError: the package safetensors is not installed.
    """
    metadata = metadata_of(state)
    check_writable(path, state)
    tensors = {key: tensor.detach().cpu() for key, tensor in state.items()}
    if path.suffix in (".pt", ".pth"):
        content = with_metadata(tensors, metadata)

        def write(aside: Path) -> None:
            torch.save(content, aside)

    else:
        save_file = _safetensors().torch.save_file
        layers = {name: entry["grid"] for name in sparse_names(state) if "grid" in (entry := metadata.get(name, {}))}
        entry = {ENTRY: json.dumps({"format_version": FORMAT_VERSION, "layers": layers})}

        def write(aside: Path) -> None:
            # cloned: the library refuses tensors that share memory, as a tied weight does
            whole = {key: tensor.contiguous().clone() for key, tensor in tensors.items()}
            save_file(whole, aside, metadata={"format": "pt", **entry})
            _sort_metadata(aside)

    try:
        replace(path, write)
    except Exception as error:  # a full disk is an OSError, a RuntimeError or a SafetensorError, as who writes likes it
        why = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"{path} cannot be written: {why}; choose another name or folder") from None


def _sort_metadata(path: Path) -> None:
    """Give the metadata of a safetensors file an order: the library writes them in any, and equal states differ."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:
            file.seek(8)
            file.write(text.ljust(length))


def read_state(path: Path, limits: Limits = DEFAULT) -> OrderedDict[str, Tensor]:
    """Return the tensors of a file on the CPU, by name.

    The first bytes say which format it is, not the name. Of a ``torch.save`` file that holds more, the entry
    ``state_dict`` or ``model`` is taken. A file ``.json`` is the index of several, as Transformers writes it. A pickle
    runs nothing: ``weights_only``.

    Raises:
        ValueError: the file is missing, empty, truncated, damaged, of a newer version, of another kind, or asks for
            more than the limits.
        ModuleNotFoundError: the package safetensors is not installed.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size  # of this file: another one may take its name
            head = file.read(9)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if size == 0:
        raise InputError(f"{path} is empty; write or fetch it again")
    if head.startswith(ZIP):
        return _checked(path, _state_in(path, read_torch(path, limits)))
    length = int.from_bytes(head[:8], "little")
    if head[8:] == b"{" and length <= LONGEST_HEADER:
        if 8 + length > size:
            raise InputError(f"{path} is truncated: its {size} bytes are fewer than its header; fetch it again")
        limits.check_tensors(path, length // HEADER_BYTES, about=True)
        return _checked(path, _read_safetensors(path, limits))
    if path.suffix == ".json":
        tensors, metadata = read_index(path, lambda part: read_state(part, limits))
        limits.check_tensors(path, len(tensors))
        return _checked(path, with_metadata(tensors, metadata))
    if head.startswith(PICKLE):
        raise InputError(
            f"{path} is a bare pickle, which could run code and is not read; load it where you trust it, and save its "
            "state_dict as safetensors"
        )
    raise InputError(f"{path} is neither a safetensors file nor one of torch.save; give a file of weights")


def _state_in(path: Path, content: Any) -> OrderedDict[str, Tensor]:
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise InputError(f"{path} holds no state_dict, which is a dict of tensors by name; save model.state_dict()")
    for key, tensor in content.items():
        is_bsr = tensor.layout == torch.sparse_bsr and tensor.dim() == 2 and f".{key}".endswith(".weight")
        if tensor.is_meta or tensor.is_nested or not (tensor.layout == torch.strided or is_bsr):
            kind = "on the meta device" if tensor.is_meta else "nested" if tensor.is_nested else str(tensor.layout)
            raise InputError(
                f"{path} has a tensor {key!r} that is {kind}; only dense tensors, and weights that are "
                "torch.sparse_bsr, are read: save it as one of those"
            )
    return with_metadata(content, metadata_of(content))


def _read_safetensors(path: Path, limits: Limits) -> OrderedDict[str, Tensor]:
    try:
        with named_in_utf8(path) as named, _safetensors().safe_open(named, "pt") as file:
            limits.check_tensors(path, len(file.keys()))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  it is no dict
            entry = (file.metadata() or {}).get(ENTRY)
    except (ModuleNotFoundError, TooLarge):
        raise
    except Exception as error:  # what a damaged file makes the library raise is any exception at all
        raise InputError(f"{path} is truncated or damaged: {first_line(error)}; fetch it again") from None
    if entry is None:
        return with_metadata(tensors, {})
    try:
        content = json.loads(entry)
        version, layers = content["format_version"], content["layers"]
        metadata = {str(name): {"version": LAYER_VERSION, "grid": grid} for name, grid in layers.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{path} is damaged: the entry {ENTRY!r} of its metadata is not one; fetch it again") from None
    if type(version) is not int or version > FORMAT_VERSION:
        raise InputError(
            f"{path} has format version {version}, and this sparsekern reads up to {FORMAT_VERSION}: install a newer "
            "one"
        )
    return with_metadata(tensors, metadata)


def _checked(path: Path, state: OrderedDict[str, Tensor]) -> OrderedDict[str, Tensor]:
    """Raise ValueError if what the metadata say about a sparse layer is damaged, or newer than this code."""
    metadata = metadata_of(state)
    for name in sparse_names(state):
        layer = metadata.get(name, {})
        version = layer.get("version") if isinstance(layer, dict) else "?"
        if version is not None and type(version) is not int:
            raise InputError(f"{path} is damaged: the metadata of layer {name!r} are not such; fetch it again")
        if version is not None and version > LAYER_VERSION:
            raise InputError(
                f"{path} has layers of version {version}, and this sparsekern reads up to {LAYER_VERSION}: install a "
                "newer one"
            )
        if "grid" in layer:
            shape = state[f"{name}.values".lstrip(".")].shape
            try:
                described_grid(layer["grid"], (shape[1], shape[2]) if len(shape) == 3 else (1, 1))
            except ValueError as error:
                raise InputError(f"{path} is damaged: {error}; fetch it again") from None
    return state


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ModuleNotFoundError:
        raise ModuleNotFoundError("files of weights need safetensors; run: pip install safetensors") from None
    return safetensors
