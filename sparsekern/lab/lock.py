"""One process a run folder: a lock that the system releases when its process ends, however it does."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparsekern.errors import InputError
from sparsekern.files.atomic_files import NO_FOLLOW, WITHOUT_LOCKS, make_parents, refuse_link

LOCK = ".lock"
"""Name of the lock file. One that a killed process left behind locks nothing."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is made if it does not exist. On disks without locks, nothing is locked.

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
        if error.errno not in WITHOUT_LOCKS:
            raise InputError(f"the folder {folder} cannot be written ({error.strerror}); choose another one") from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: another process that waits for this file sees that it is gone
        lock.release()


def _note_owner(path: Path) -> None:
    """Write process and machine, as filelock itself does on disks where the file stands for the lock."""
    mine = f"{os.getpid()}\n{platform.node()}"
    handle = os.open(path, os.O_RDWR | NO_FOLLOW)
    with open(handle, "r+", encoding="utf-8", errors="replace") as file:
        if file.read(len(mine)) != mine:
            file.seek(0)
            file.write(mine)
            file.truncate()


def _owner(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            text = " on ".join(file.read(100).split("\n")[:2])
    except OSError:
        return ""
    return f" ({text})" if text else ""
