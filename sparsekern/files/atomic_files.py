"""Files and folders that appear whole or not at all, whoever else writes them and whatever happens meanwhile.

Everything is written in a private folder beside its final place, and renamed when it is complete. The name of the
private folder is random, so writers of one path never meet, and nothing that lies there beforehand, such as a symbolic
link, is ever opened. A lock in the private folder tells whether its writer still lives.
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
"""The file in a private folder that its writer holds locked."""

PRIVATE = re.compile(r"\.([0-9a-f]{8})-[0-9a-f]{16}\.unfinished")
"""Names of private folders: the writer's machine, and a random number."""

WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
"""Errors of disks that have no locks, as some of clusters: nobody there takes a folder without one for a leftover."""

NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)  # Windows has no such flag


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file, sync it to the disk, and give it its name, in place of an older file or symbolic link.

    Of several writers the last one wins. Whatever ``write`` raises leaves an older file as it was.

    Args:
        path: the file. Its permissions follow the umask.
        write: gets the path of an empty file with the same suffix, and writes that.

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
    """Make a folder with its content, synced to the disk.

    Of several writers the first one wins: a folder that is there already stays, and the new one is dropped.

    Args:
        path: the folder.
        fill: gets the path of an empty folder, and writes files into it.

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
    """Delete a folder, or a symbolic link in its place: at once by name, so that no half of it is ever found.

    Raises:
        OSError: it is not there, or cannot be moved.
    """
    with _private_folder(path) as folder:
        path.rename(folder / "content")


def make_parents(path: Path) -> None:
    """Make a folder and those that it lies in, and sync the entries of the new ones. Existing ones are left alone.

    Raises:
        OSError: one of them cannot be made, or is no folder.
    """
    if path.is_dir():
        return
    make_parents(path.parent)
    path.mkdir(exist_ok=True)
    sync(path.parent)


def append(path: Path, text: str) -> None:
    """Add text at the end of a file, which is made if it is not there.

    Raises:
        OSError: the file cannot be written, or is a symbolic link.
    """
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | NO_FOLLOW, 0o666)
    with open(handle, "a", encoding="utf-8") as file:
        file.write(text)


def refuse_link(path: Path) -> None:
    """Check that a path into which the package writes is no symbolic link.

    Raises:
        ValueError: it is one.
    """
    if path.is_symlink():
        raise InputError(
            f"{path} is a symbolic link, and files are not written through links: put the folder itself in its place, "
            "or choose another folder"
        )


def is_private(name: str) -> bool:
    """Return whether a name is that of a private folder, which no reader needs to look at."""
    return PRIVATE.fullmatch(name) is not None


def remove_leftovers(parent: Path) -> None:
    """Delete the private folders of writers that were killed.

    A folder whose lock is held is being written. The lock of a writer on another machine may not be visible here, so
    its folder stays.
    """
    from filelock import FileLock

    with suppress(OSError), os.scandir(parent) as entries:
        found = [entry for entry in entries if (name := PRIVATE.fullmatch(entry.name)) and name[1] == _machine()]
        for folder in [Path(entry) for entry in found if entry.is_dir(follow_symlinks=False)]:
            with suppress(OSError), FileLock(folder / LOCK, timeout=0):  # Timeout is an OSError
                shutil.rmtree(folder, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder, and needs no sync of one
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _private_folder(path: Path) -> Iterator[Path]:
    """Make a private folder beside a path, hold its lock, and delete it in the end with what it holds.

    Errors of the system name ``path``.
    """
    try:
        remove_leftovers(path.parent)
        folder, lock = _new_private_folder(path.parent)
        try:
            yield folder
        finally:
            lock.release()  # first: a network disk keeps files that are open
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
        except (FileNotFoundError, Timeout):
            continue  # another writer took the folder, not locked yet, for a leftover, and deletes it
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                shutil.rmtree(folder, ignore_errors=True)
                raise
        return folder, lock


def _machine() -> str:
    return hashlib.blake2s(platform.node().encode(), digest_size=4).hexdigest()
