"""IDX files, the format in which MNIST and Fashion-MNIST are distributed."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from sparsekern.errors import InputError

if TYPE_CHECKING:
    import numpy

IMAGES, LABELS = 3, 1
"""Dimensions of the two kinds of files: (images, rows, columns) and (labels,)."""

UNSIGNED_BYTE = 0x08


def idx_shape(path: Path, dimensions: int) -> tuple[int, ...]:
    """Return the shape that the header of an IDX file promises. Nothing else is read.

    Args:
        path: the file; a name that ends in ``.gz`` is decompressed.
        dimensions: how many there must be: :data:`IMAGES` or :data:`LABELS`.

    Raises:
        ValueError: the file is not what its name says, or is damaged; the text says how.
    """
    return _read(path, dimensions, content=False)[0]


def read_idx(path: Path, dimensions: int) -> numpy.ndarray:
    """Return the array of unsigned bytes in an IDX file, gzipped or not. No more is read than the header promises.

    Args:
        path: the file; a name that ends in ``.gz`` is decompressed.
        dimensions: how many there must be: :data:`IMAGES` or :data:`LABELS`.

    Raises:
        ValueError: the file is not what its name says, or is damaged; the text says how.
    """
    import numpy

    shape, content = _read(path, dimensions, content=True)
    return numpy.frombuffer(content, dtype=numpy.uint8).reshape(shape)


def _read(path: Path, dimensions: int, *, content: bool) -> tuple[tuple[int, ...], bytes]:
    """Return the shape, and the bytes that follow the header unless they are not wanted."""
    head = 4 + 4 * dimensions
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            shape = _shape(path, file.read(head), dimensions)
            size = math.prod(shape)
            if not content:
                return shape, b""
            if path.suffix == ".gz":
                found = file.read(size + 1)
                follow = len(found)
            else:
                follow = path.stat().st_size - head
                found = file.read(size) if follow == size else b""
    except EOFError:
        raise InputError(f"{path} is truncated: the compressed data end too early; fetch it again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path} is not a gzip file, or damaged ({error}); fetch it again") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if follow != size:
        more = " or more" if follow > size and path.suffix == ".gz" else ""
        raise InputError(
            f"{path} is {'truncated' if follow < size else 'damaged'}: its header promises "
            f"{' x '.join(map(str, shape))} = {size} bytes, {follow}{more} follow; fetch it again"
        )
    return shape, found


def _shape(path: Path, head: bytes, dimensions: int) -> tuple[int, ...]:
    magic, wanted = int.from_bytes(head[:4], "big"), UNSIGNED_BYTE << 8 | dimensions
    if len(head) >= 4 and magic != wanted:
        kind = "images" if dimensions == IMAGES else "labels"
        raise InputError(
            f"{path} begins with magic number 0x{magic:08x}; an IDX file of {kind} begins with 0x{wanted:08x}"
        )
    if len(head) < 4 + 4 * dimensions:
        raise InputError(f"{path} is truncated: it has {len(head)} bytes, fewer than the header; fetch it again")
    return tuple(int.from_bytes(head[at : at + 4], "big") for at in range(4, len(head), 4))


def find_idx(folder: Path, stem: str, dimensions: int) -> Path:
    """Return the file ``<stem>-idx<n>-ubyte`` in a folder, also with a dot before ``idx`` and with ``.gz`` behind.

    Raises:
        ValueError: there is none.
    """
    for suffix in ("", ".gz"):
        for separator in ("-", "."):
            path = folder / f"{stem}{separator}idx{dimensions}-ubyte{suffix}"
            if path.is_file():
                return path
    raise InputError(
        f"{folder} has no {stem}-idx{dimensions}-ubyte (with or without .gz); a folder of IDX files holds "
        "train-images, train-labels, t10k-images and t10k-labels"
    )
