"""Reading files of ``torch.save`` without executing anything in them, and without trusting their sizes."""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from sparsekern.errors import InputError
from sparsekern.files.size_limits import DEFAULT, Limits, TooLarge

PICKLE_BYTES = 160
"""Estimated bytes per tensor in the pickle of a state dict: its name, shape and storage."""

ITEMS = 100
"""Values of any kind that a file may hold, per tensor that it may hold."""


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
