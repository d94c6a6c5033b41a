"""Files of weights: safetensors, and those of ``torch.save``. Nothing in a file is ever executed."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from sparsekern.errors import InputError
from sparsekern.files.atomic_files import replace
from sparsekern.files.size_limits import DEFAULT, Limits, TooLarge
from sparsekern.files.states import metadata_of, sparse_names, with_metadata
from sparsekern.nn.layer_state import LAYER_VERSION, grid_in

FORMAT_VERSION = 2
"""Version of a safetensors file with sparse layers, whose metadata hold the grids of the layers."""

ENTRY = "sparsekern"
"""Key of these grids in the metadata of a safetensors file."""

ZIP, PICKLE = b"PK\x03\x04", b"\x80"
"""First bytes of the files of ``torch.save``: a zip archive since PyTorch 1.6, a bare pickle before."""

LONGEST_HEADER = 100_000_000
"""Maximum length in bytes of the header of a safetensors file, as in its library."""

HEADER_BYTES = 200
"""Estimated bytes of that header per tensor, for names of usual length."""

PICKLE_BYTES = 160
"""Estimated bytes per tensor in the pickle of a state dict: its name, shape and storage."""

ITEMS = 100
"""Values of any kind that a file may hold, per tensor that it may hold."""

LARGEST_INDEX = 2**26
"""Maximum size in bytes of the index of a state in several files, ten times that of the largest published models."""


def check_writable(path: Path, state: Mapping[str, Any]) -> None:
    """Check that a state dict holds only tensors with data.

    Args:
        path: where it is to be written, for the error.
        state: the state dict.

    Raises:
        ValueError: it does not.
    """
    if other := [key for key, tensor in state.items() if not isinstance(tensor, Tensor)]:
        raise InputError(
            f"{path} cannot be written: {other[0]} is not a tensor, and files hold only tensors; leave it out"
        )
    if absent := [key for key, tensor in state.items() if tensor.is_meta]:
        raise InputError(
            f"{path} cannot be written: {absent[0]} is on the meta device and has no data; load or initialise the "
            "model first"
        )


def write_state(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write a state dict as safetensors, or with ``torch.save`` if the name ends in ``.pt`` or ``.pth``.

    The file appears complete or not at all; an older file or a symbolic link is replaced. The metadata of sparse layers
    are kept.

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
            # cloned because the library refuses tensors that share memory, such as tied weights
            whole = {key: tensor.contiguous().clone() for key, tensor in tensors.items()}
            save_file(whole, aside, metadata={"format": "pt", **entry})
            _sort_metadata(aside)

    try:
        replace(path, write)
    except Exception as error:  # a full disk is an OSError, a RuntimeError or a SafetensorError
        why = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"{path} cannot be written: {why}; choose another name or folder") from None


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file, so that equal states give equal files."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:
            file.seek(8)
            file.write(text.ljust(length))


def read_state(path: Path, limits: Limits = DEFAULT) -> OrderedDict[str, Tensor]:
    """Read the tensors of a file onto the CPU, by name.

    The format is determined by the first bytes, not by the name: safetensors, a file of ``torch.save`` (if it holds
    more than tensors, its entry ``state_dict`` or ``model``), or a ``.json`` index of several files, as Transformers
    writes it. Pickles are read with ``weights_only=True`` and execute nothing.

    Raises:
        ValueError: the file is missing, empty, truncated, damaged, of another version or format, or asks for more than
            the limits.
        ModuleNotFoundError: the package safetensors is not installed.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size  # of this open file; another one may take its name
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
            f"{path} is a bare pickle, which could run code and is not read; if you trust it, load it with PyTorch and "
            "save its state_dict as safetensors"
        )
    raise InputError(f"{path} is neither a safetensors file nor one of torch.save; give a file of weights")


def read_index(path: Path, read: Callable[[Path], Mapping[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a state dict in several files by the index that Transformers writes; return tensors and metadata.

    Args:
        path: ``model.safetensors.index.json`` or ``pytorch_model.bin.index.json``, in the folder of the files.
        read: function that reads one of the files.

    Raises:
        ValueError: the file is not such an index, or a tensor is not in the file that it names.
    """
    try:
        if path.stat().st_size > LARGEST_INDEX:
            raise ValueError
        weight_map = json.loads(path.read_bytes())["weight_map"]
        files = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(
            f"{path} is not an index of weights in several files, with an entry weight_map; give a file of weights"
        ) from None
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, Any] = {}
    for file in sorted(set(files.values())):
        if Path(file).name != file or file.endswith(".json"):
            raise InputError(f"{path} names the file {file!r}; it must name files of weights in its own folder")
        part = read(path.with_name(file))
        absent = [name for name, where in files.items() if where == file and name not in part]
        if absent:
            raise InputError(f"{path.with_name(file)} lacks the tensor {absent[0]!r} that {path.name} names")
        tensors |= {name: part[name] for name, where in files.items() if where == file}
        metadata |= getattr(part, "_metadata", {})
    return tensors, metadata


def _state_in(path: Path, content: Any) -> OrderedDict[str, Tensor]:
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise InputError(f"{path} does not hold a state_dict, a dict of tensors by name; save model.state_dict()")
    for key, tensor in content.items():
        is_bsr = tensor.layout == torch.sparse_bsr and tensor.dim() == 2 and f".{key}".endswith(".weight")
        if tensor.is_meta or tensor.is_nested or not (tensor.layout == torch.strided or is_bsr):
            kind = "on the meta device" if tensor.is_meta else "nested" if tensor.is_nested else str(tensor.layout)
            raise InputError(
                f"{path} has a tensor {key!r} that is {kind}; only dense tensors and torch.sparse_bsr weights are "
                "read: save it as one of these"
            )
    return with_metadata(content, metadata_of(content))


def _read_safetensors(path: Path, limits: Limits) -> OrderedDict[str, Tensor]:
    try:
        with named_in_utf8(path) as named, _safetensors().safe_open(named, "pt") as file:
            limits.check_tensors(path, len(file.keys()))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
            entry = (file.metadata() or {}).get(ENTRY)
    except (ModuleNotFoundError, TooLarge):
        raise
    except Exception as error:  # a damaged file can raise anything
        raise InputError(f"{path} is truncated or damaged: {first_line(error)}; fetch it again") from None
    if entry is None:
        return with_metadata(tensors, {})
    try:
        content = json.loads(entry)
        version, layers = content["format_version"], content["layers"]
        metadata = {str(name): {"version": LAYER_VERSION, "grid": grid} for name, grid in layers.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{path} is damaged: the entry {ENTRY!r} of its metadata is invalid; fetch it again") from None
    if version != FORMAT_VERSION:
        raise InputError(
            f"{path} has format version {version}, and this sparsekern reads version {FORMAT_VERSION}; use the version "
            "of sparsekern that wrote it"
        )
    return with_metadata(tensors, metadata)


def _checked(path: Path, state: OrderedDict[str, Tensor]) -> OrderedDict[str, Tensor]:
    """Return the state dict; raise ValueError if the metadata of a sparse layer are damaged or of another version."""
    metadata = metadata_of(state)
    for name in sparse_names(state):
        shape = state[f"{name}.values".lstrip(".")].shape
        try:
            grid_in(metadata.get(name, {}), (shape[1], shape[2]) if len(shape) == 3 else (1, 1))
        except InputError as error:
            raise InputError(f"{path} cannot be read: layer {name!r}: {error}") from None
    return state


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ModuleNotFoundError:
        raise ModuleNotFoundError("files of weights need safetensors; run: pip install safetensors") from None
    return safetensors


def read_torch(path: Path, limits: Limits = DEFAULT) -> Any:
    """Read the content of a ``torch.save`` file, tensors and plain values, with tensors on the CPU.

    Raises:
        ValueError: the file is damaged anywhere, holds anything else, or asks for more than the limits. Nothing in it
            has been executed.
    """
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise InputError("it is compressed")
            pickles = max((entry.file_size for entry in entries if entry.filename.endswith("data.pkl")), default=0)
            limits.check_tensors(path, max(len(entries), pickles // PICKLE_BYTES), about=True)
            damaged = archive.testzip()
        if damaged is not None:
            raise InputError(f"the checksum of {damaged} is wrong")
        # With mmap no tensor can extend beyond the file, whatever its pickle says.
        with named_in_utf8(path) as named:
            content = torch.load(named, map_location="cpu", weights_only=True, mmap=True)
        limits.check_bytes(path, _bytes(path, content, limits), size)
        return _owned(content)
    except TooLarge:
        raise
    except Exception as error:  # a damaged file can raise anything
        unsafe = isinstance(error, pickle.UnpicklingError)
        reason = "it asks for more than tensors, which is not loaded" if unsafe else first_line(error)
        raise InputError(f"{path} is damaged, or not a torch.save file of plain tensors: {reason}") from None


@contextmanager
def named_in_utf8(path: Path) -> Iterator[Path]:
    """Yield a path to the same file that can be encoded in UTF-8, as some libraries require.

    If the file's own name cannot be, this is a temporary symbolic link.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with TemporaryDirectory() as folder:
            link = Path(folder, "link")
            link.symlink_to(path.absolute())
            yield link
    else:
        yield path


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if there is none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _bytes(path: Path, content: Any, limits: Limits) -> int:
    """Return the bytes that all tensors in the content take if each is copied.

    Raises:
        TooLarge: there are more values than the limits allow, as in a list that contains itself.
    """
    todo, seen, total = [content], 0, 0
    while todo:
        item = todo.pop()
        seen += 1
        if isinstance(item, Tensor):
            total += sum(part.numel() * part.element_size() for part in _parts(item))
        elif isinstance(item, dict):
            todo += item.values()
        elif type(item) in (list, tuple):
            todo += item
        if seen + len(todo) > ITEMS * limits.tensors:
            raise TooLarge(
                f"{path} holds over {ITEMS * limits.tensors} values, and max_tensors is {limits.tensors}; if you "
                "trust it, choose a larger max_tensors"
            )
    return total


def _parts(tensor: Tensor) -> Sequence[Tensor]:
    """Return the dense tensors that make up a tensor of any layout."""
    if tensor.is_meta:
        return ()
    if tensor.layout == torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    return (tensor,)


def _owned(content: Any) -> Any:
    """Return the content with tensors copied out of the mapped file."""
    if isinstance(content, Tensor):
        return content.clone()
    if isinstance(content, dict):
        new: dict[Any, Any] = OrderedDict() if isinstance(content, OrderedDict) else {}
        new.update((key, _owned(value)) for key, value in content.items())
        if isinstance(content, OrderedDict):
            new.__dict__.update(content.__dict__)  # a state_dict's metadata
        return new
    if type(content) in (list, tuple):
        return type(content)(_owned(item) for item in content)
    return content
