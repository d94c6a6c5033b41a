"""Reading what ``torch.save`` wrote without running anything, and without believing what the file says of itself."""

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
"""Of a tensor in the pickle of a state, about: its name, its shape, and where its numbers are."""

ITEMS = 100
"""Values of any kind that a file may hold for each tensor that it may hold."""


def read_torch(path: Path, limits: Limits = DEFAULT) -> Any:
    """Return the content of a ``torch.save`` file, tensors on the CPU, if that is tensors and plain values.

    Raises:
        ValueError: the file is damaged, anywhere in it, holds anything else, or asks for more than the limits. Nothing
            of it has run.
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
        # Mapped, no tensor can reach beyond the file, whatever its pickle says.
        with named_in_utf8(path) as named:
            content = torch.load(named, map_location="cpu", weights_only=True, mmap=True)
        limits.check_bytes(path, _bytes(path, content, limits), size)
        return _owned(content)
    except TooLarge:
        raise
    except Exception as error:  # what a damaged file makes the readers raise is any exception at all
        unsafe = isinstance(error, pickle.UnpicklingError)
        reason = "it asks for more than tensors, which is not loaded" if unsafe else first_line(error)
        raise InputError(f"{path} is damaged, or no torch.save file of plain tensors: {reason}") from None


@contextmanager
def named_in_utf8(path: Path) -> Iterator[Path]:
    """Yield a path that means the same file and is text in UTF-8, as a name need not be and libraries want it.

    Mapping a file wants a name; a link lends it one.
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
    """Return the first line of an error's text, or the name of its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _bytes(path: Path, content: Any, limits: Limits) -> int:
    """Return the bytes of all tensors in a content if each has a copy of its own.

    Raises:
        TooLarge: there are more values than the limits allow; a list that holds itself has no end.
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
    """Return the tensors with numbers of a tensor in memory."""
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
    """Return the content with copies in place of tensors that lie in the mapped file."""
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
