"""States as a checkpoint brings them back."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import torch


def through_a_file(parts: Iterable[Any]) -> list[dict[str, Any]]:
    """Return the states of models, optimizers or methods, written and read again with ``weights_only``."""
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts], file)
    file.seek(0)
    states: list[dict[str, Any]] = torch.load(file, weights_only=True)
    return states
