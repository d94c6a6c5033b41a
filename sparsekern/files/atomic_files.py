"""Files and folders that appear complete or not at all, even with several writers or after a crash.

Everything is written in a private folder beside its final place and renamed when complete. The private folder has a
random name, so writers of the same path do not interfere, and no existing file or symbolic link is ever opened. A lock
in the private folder shows whether its writer is still running.
"""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sparsekern.errors import InputError

if TYPE_CHECKING:
    from filelock import FileLock

LOCK = "lock"
"""Name of the file in a private folder that its writer keeps locked."""

PRIVATE = re.compile(r"\.([0-9a-f]{8})-[0-9a-f]{16}\.unfinished")
"""Names of private folders: a hash of the writer's machine, and a random number."""

WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
"""Errors of file systems without locks, as on some clusters; folders without a lock are never removed there."""

NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)  # Windows has no such flag


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file, sync it to the disk, and rename it to ``path``, replacing an older file or symbolic link.

    If there are several writers, the last one wins. If ``write`` raises, an older file stays unchanged.

    Args:
        path: the file. Its permissions follow the umask.
        write: function that is given the path of an empty file with the same suffix and writes to it.

    Raises:
        OSError: the file cannot be written.
    """
    with _private_folder(path) as folder:
        unfinished = folder / f"content{path.suffix}"
        unfinished.touch(exist_ok=False)
        mode = unfinished.stat().st_mode & 0o777
        write(unfinished)
        unfinished.chmod(mode)  # the safetensors library replaces the file by one that only its owner may read
        sync(unfinished)
        unfinished.replace(path)
        sync(path.parent)


def make_folder(path: Path, fill: Callable[[Path], object]) -> None:
    """Make a folder with content, synced to the disk.

    If there are several writers, the first one wins: an existing folder stays, and the new one is discarded.

    Args:
        path: the folder.
        fill: function that is given the path of an empty folder and writes files into it.

    Raises:
        OSError: the folder cannot be made.
    """
    with _private_folder(path) as folder:
        unfinished = folder / "content"
        unfinished.mkdir()
        fill(unfinished)
        for file in unfinished.iterdir():
            sync(file)
        sync(unfinished)
        try:
            unfinished.rename(path)
        except OSError:
            if not path.is_dir():
                raise
        sync(path.parent)


def remove_folder(path: Path) -> None:
    """Delete a folder or symbolic link. It is renamed first, so that no partial folder is ever visible.

    Raises:
        OSError: it does not exist, or cannot be renamed.
    """
    with _private_folder(path) as folder:
        path.rename(folder / "content")


def make_parents(path: Path) -> None:
    """Make a folder and its parents where they do not exist, synced to the disk.

    Raises:
        OSError: one of them cannot be made, or is not a folder.
    """
    if path.is_dir():
        return
    make_parents(path.parent)
    path.mkdir(exist_ok=True)
    sync(path.parent)


def append(path: Path, text: str) -> None:
    """Append text to a file, which is made if it does not exist.

    Raises:
        OSError: the file cannot be written, or is a symbolic link.
    """
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | NO_FOLLOW, 0o666)
    with open(handle, "a", encoding="utf-8") as file:
        file.write(text)


def refuse_link(path: Path) -> None:
    """Raise ValueError if a path that the package writes to is a symbolic link."""
    if path.is_symlink():
        raise InputError(
            f"{path} is a symbolic link, and files are not written through links: replace it by the folder itself, or "
            "choose another folder"
        )


def is_private(name: str) -> bool:
    """Return whether a name is that of a private folder, which readers ignore."""
    return PRIVATE.fullmatch(name) is not None


def remove_leftovers(parent: Path) -> None:
    """Delete the private folders of killed writers in ``parent``.

    Folders whose lock is held are kept, and so are those of other machines, whose locks may not be visible here.
    """
    from filelock import FileLock

    with suppress(OSError), os.scandir(parent) as entries:
        found = [entry for entry in entries if (name := PRIVATE.fullmatch(entry.name)) and name[1] == _machine()]
        for folder in [Path(entry) for entry in found if entry.is_dir(follow_symlinks=False)]:
            with suppress(OSError), FileLock(folder / LOCK, timeout=0):  # Timeout is an OSError
                shutil.rmtree(folder, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file, or the list of a folder's entries, is on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders and need not sync them
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _private_folder(path: Path) -> Iterator[Path]:
    """Make a private folder beside ``path``, hold its lock, and finally delete it with its content.

    Errors of the operating system are changed to name ``path``.
    """
    try:
        remove_leftovers(path.parent)
        folder, lock = _new_private_folder(path.parent)
        try:
            yield folder
        finally:
            lock.release()  # first, because network disks keep open files
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        if error.filename is not None:
            error.filename, error.filename2 = str(path), None
        raise


def _new_private_folder(parent: Path) -> tuple[Path, FileLock]:
    from filelock import FileLock, Timeout

    while True:
        folder = parent / f".{_machine()}-{secrets.token_hex(8)}.unfinished"
        folder.mkdir(0o700)
        lock = FileLock(folder / LOCK, timeout=0)
        try:
            lock.acquire()
        except (FileNotFoundError, FileExistsError, Timeout):  # FileExistsError from mkdir, if deleted at that moment
            continue  # another writer took the folder, before it was locked, for a leftover and deletes it
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                shutil.rmtree(folder, ignore_errors=True)
                raise
        return folder, lock


def _machine() -> str:
    return hashlib.blake2s(platform.node().encode(), digest_size=4).hexdigest()
