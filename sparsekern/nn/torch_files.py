"""Reading what ``torch.save`` wrote without running anything, and without believing what the file says of itself."""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def read_torch(path: Path) -> Any:
    """Return the content of a ``torch.save`` file, tensors on the CPU, if that is tensors and plain values.

    Raises:
        ValueError: the file is damaged, anywhere in it, or holds anything else. Nothing of it has run.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("it is compressed")
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")
        # Mapped, no tensor can reach beyond the file, whatever its pickle says.
        return _owned(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except Exception as error:  # what a damaged file makes the readers raise is any exception at all
        unsafe = isinstance(error, pickle.UnpicklingError)
        reason = "it asks for more than tensors, which is not loaded" if unsafe else first_line(error)
        raise ValueError(f"{path} is damaged, or no torch.save file of plain tensors: {reason}") from None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or the name of its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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
