"""CIFAR-10 and CIFAR-100 as their author distributes them: python batches or binary, a folder or a ``.tar.gz``."""

from __future__ import annotations

import lzma
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from sparsekern.errors import InputError
from sparsekern.lab.npz import KEYS
from sparsekern.lab.unpickle import unpickle

if TYPE_CHECKING:
    import numpy

SHAPE = (3, 32, 32)
"""Of an image; stored as its red, then its green, then its blue pixels, row by row."""

BYTES = 3 * 32 * 32

LARGEST_FILE = 2**28
"""Bytes; the largest file that is distributed, CIFAR-100's training images, has 0.6 of it."""

Part = tuple["numpy.ndarray", "numpy.ndarray"]


@dataclass(frozen=True)
class Form:
    """One of the four forms.

    Attributes:
        name: for errors.
        train: names of the files with training images, in order.
        test: that of the file with test images.
        classes: labels are 0 to ``classes - 1``.
        read: gets content, its name for errors, and this; returns images ``(N, 3072)`` and labels ``(N,)``.
        label: the entry with the labels in a python batch; in a binary file, at which byte of a record it is.
        head: bytes before the pixels of a binary record.
    """

    name: str
    train: tuple[str, ...]
    test: str
    classes: int
    read: Callable[[bytes, str, Form], Part]
    label: bytes | int
    head: int = 0


def _python_batch(content: bytes, source: str, form: Form) -> Part:
    import numpy

    batch = unpickle(content, source)
    if not isinstance(batch, dict):
        raise InputError(f"{source} holds a {type(batch).__name__}; a batch of {form.name} is a dict")
    batch = {key.encode() if isinstance(key, str) else key: value for key, value in batch.items()}
    images, labels = batch.get(b"data"), batch.get(form.label)
    if not isinstance(images, numpy.ndarray) or images.ndim != 2 or images.shape[1] != BYTES:
        shape = getattr(images, "shape", None)
        raise InputError(f"{source} has data of shape {shape}; a batch of {form.name} has (images, {BYTES})")
    if not isinstance(labels, list) or not all(type(label) is int and abs(label) < 2**31 for label in labels):
        raise InputError(f"{source} has no list {form.label!r} of whole numbers, the labels of {form.name}")
    return images, numpy.array(labels, dtype="int64")


def _binary(content: bytes, source: str, form: Form) -> Part:
    import numpy

    record = form.head + BYTES
    if not content or len(content) % record:
        raise InputError(
            f"{source} is truncated or damaged: it has {len(content)} bytes, not a multiple of the {record} of an "
            f"image of {form.name}; fetch it again"
        )
    records = numpy.frombuffer(content, dtype=numpy.uint8).reshape(-1, record)
    assert isinstance(form.label, int)
    return records[:, form.head :], records[:, form.label].astype("int64")


_TEN = tuple(f"data_batch_{i}" for i in range(1, 6))

FORMS = (
    Form("CIFAR-10 (binary)", tuple(f"{name}.bin" for name in _TEN), "test_batch.bin", 10, _binary, 0, head=1),
    Form("CIFAR-100 (binary)", ("train.bin",), "test.bin", 100, _binary, 1, head=2),
    Form("CIFAR-10 (python)", _TEN, "test_batch", 10, _python_batch, b"labels"),
    Form("CIFAR-100 (python)", ("train",), "test", 100, _python_batch, b"fine_labels"),
)


def is_cifar(folder: Path) -> bool:
    """Return whether a folder has a file of CIFAR."""
    return any((folder / name).is_file() for form in FORMS for name in (*form.train, form.test))


def read_cifar_folder(folder: Path) -> dict[str, numpy.ndarray]:
    """Return the arrays of the files in a folder: images ``(N, 3, 32, 32)`` uint8, labels ``(N,)``.

    Raises:
        ValueError: a file is missing, damaged, or has labels that its data set does not have.
    """
    files = {name: folder / name for name in _names() if (folder / name).is_file()}
    return _read(str(folder), set(files), lambda name: _content(files[name]))


def read_cifar_tar(path: Path, check_bytes: Callable[[int], None] = lambda size: None) -> dict[str, numpy.ndarray]:
    """Return the arrays of the files in a tar archive, compressed or not. Nothing is written to the disk.

    Args:
        path: the archive.
        check_bytes: gets the bytes of all files so far before the next is read, and raises ValueError to refuse them.

    Raises:
        ValueError: it is no such archive, or see :func:`read_cifar_folder`.
    """
    contents, size = {}, 0
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                file = archive.extractfile(member) if name in _names() and member.isfile() else None
                if file is not None:
                    size += min(member.size, LARGEST_FILE)
                    check_bytes(size)
                    contents[name] = file.read(LARGEST_FILE)
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError):
        raise InputError(
            f"data is {path}, which is damaged or no tar archive; fetch it again", parameter="data"
        ) from None
    return _read(str(path), set(contents), contents.__getitem__)


def _names() -> set[str]:
    return {name for form in FORMS for name in (*form.train, form.test)}


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(LARGEST_FILE)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def _read(where: str, there: set[str], content: Callable[[str], bytes]) -> dict[str, numpy.ndarray]:
    import numpy

    form = next((form for form in FORMS if there & {*form.train, form.test}), None)
    if form is None:
        raise InputError(f"{where} has no file of CIFAR-10 or CIFAR-100, such as data_batch_1, train or train.bin")
    absent = [name for name in (*form.train, form.test) if name not in there]
    if absent:
        wanted = ", ".join((*form.train, form.test))
        raise InputError(f"{where} has no {', '.join(absent)}; {form.name} has {wanted}")
    arrays = []
    for names in (form.train, (form.test,)):
        parts = [_part(form, content(name), f"{where}: {name}") for name in names]
        arrays += [numpy.concatenate(kind) for kind in zip(*parts, strict=True)]
    return dict(zip(KEYS, arrays, strict=True))


def _part(form: Form, content: bytes, source: str) -> Part:
    """Return images ``(N, 3, 32, 32)`` and labels of one file."""
    images, labels = form.read(content, source, form)
    if len(images) != len(labels):
        raise InputError(f"{source} has {len(images)} images but {len(labels)} labels; there must be one an image")
    if len(labels) and not 0 <= labels.min() <= labels.max() < form.classes:
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise InputError(f"{source} has label {wrong}; those of {form.name} are 0 to {form.classes - 1}")
    return images.reshape(-1, *SHAPE), labels
