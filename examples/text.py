"""Text that every machine has, as the bytes of Python's own standard library: what the examples of GPTs train on."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from torch import Tensor


def standard_library(limit: int = 2_000_000) -> tuple[Tensor, Tensor]:
    """Return bytes to train on and bytes to test on, ``(N,)`` int64 each; no file is in both."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    parts = [b"".join(path.read_bytes() for path in files[start::10]) for start in range(10)]
    train, test = b"".join(parts[1:])[:limit], parts[0][: limit // 10]
    return tuple(torch.frombuffer(bytearray(part), dtype=torch.uint8).long() for part in (train, test))  # type: ignore


def batch(text: Tensor, context: int, size: int, seed: int) -> Tensor:
    """Return a batch ``(size, context)`` from anywhere in the text; the seed says where."""
    starts = torch.randint(len(text) - context, (size, 1), generator=torch.Generator().manual_seed(seed))
    return text[starts + torch.arange(context)]
