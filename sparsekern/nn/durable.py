"""Files that are there whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

ASIDE = ".unfinished"
"""Ends the name of a file or folder that is still being written."""


def aside(path: Path) -> Path:
    """Return where a file is written before it gets its name."""
    return path.with_name(path.name + ASIDE)


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file aside; sync it to the disk, give it its name, and sync the folder.

    An older file of that name stays until then. What ``write`` raises leaves no file behind.
    """
    unfinished = aside(path)
    try:
        write(unfinished)
        sync(unfinished)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    unfinished.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder, and needs no sync of one
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
