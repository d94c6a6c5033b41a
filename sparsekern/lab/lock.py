"""One process a run folder: a lock that the system itself opens when the process dies, however it does."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparsekern.errors import InputError
from sparsekern.files.atomic_files import NO_FOLLOW, make_parents, refuse_link

LOCK = ".lock"
"""Name of the lock file. One that a killed process left behind locks nothing."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is made if it is not there.

    Raises:
        ValueError: another process holds it, the folder cannot be written, or the lock file is a symbolic link.
    """
    from filelock import FileLock, Timeout

    path = folder / LOCK
    owner, lock = _owner(path), FileLock(path, timeout=0.1, poll_interval=0.01)
    try:
        refuse_link(path)
        make_parents(folder)
        lock.acquire()
        _note_owner(path)
    except Timeout:
        raise InputError(
            f"the folder {folder} is in use by another process{owner}; wait for it, or stop it first"
        ) from None
    except OSError as error:
        raise InputError(f"the folder {folder} cannot be written ({error.strerror}); choose another one") from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: who waits for this file notices that it is gone
        lock.release()


def _note_owner(path: Path) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_TRUNC | NO_FOLLOW)
    with open(handle, "w", encoding="utf-8") as file:
        file.write(f"{os.getpid()} on {platform.node()}")


def _owner(path: Path) -> str:
    try:
        text = path.read_text(errors="replace").strip()[:100]
    except OSError:
        return ""
    return f" ({text})" if text else ""
