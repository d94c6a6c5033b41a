"""States as a checkpoint brings them back, and what a killed writer leaves."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from sparsekern.files.atomic_files import _machine


def through_a_file(parts: Iterable[Any]) -> list[dict[str, Any]]:
    """Return the states of models, optimizers or methods, written and read again with ``weights_only``."""
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts], file)
    file.seek(0)
    states: list[dict[str, Any]] = torch.load(file, weights_only=True)
    return states


def leftover(folder: Path, number: int = 0) -> Path:
    """Return the path of a private folder that a writer left in a folder when it was killed."""
    return folder / f".{_machine()}-{number:016x}.unfinished"
