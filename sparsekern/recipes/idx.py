"""IDX files, the format in which MNIST and Fashion-MNIST are distributed."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy

IMAGES, LABELS = 3, 1
"""Dimensions of the two kinds of files: (images, rows, columns) and (labels,)."""

UNSIGNED_BYTE = 0x08


def read_idx(path: Path, dimensions: int) -> numpy.ndarray:
    """Return the array of unsigned bytes in an IDX file, gzipped or not.

    Args:
        path: the file; a name that ends in ``.gz`` is decompressed.
        dimensions: how many there must be: :data:`IMAGES` or :data:`LABELS`.

    Raises:
        ValueError: the file is not what its name says, or is damaged; the text says how.
    """
    import numpy

    content = _read(path)
    head = 4 + 4 * dimensions
    if len(content) < 4:
        raise ValueError(f"{path} is truncated: it has {len(content)} bytes, fewer than the header; fetch it again")
    magic, wanted = int.from_bytes(content[:4], "big"), UNSIGNED_BYTE << 8 | dimensions
    if magic != wanted:
        kind = "images" if dimensions == IMAGES else "labels"
        raise ValueError(
            f"{path} begins with magic number 0x{magic:08x}; an IDX file of {kind} begins with 0x{wanted:08x}"
        )
    if len(content) < head:
        raise ValueError(f"{path} is truncated: it has {len(content)} bytes, fewer than the header; fetch it again")
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, head, 4)]
    if len(content) - head != math.prod(shape):
        state = "truncated" if len(content) - head < math.prod(shape) else "damaged"
        raise ValueError(
            f"{path} is {state}: its header promises {' x '.join(map(str, shape))} = {math.prod(shape)} bytes, "
            f"{len(content) - head} follow; fetch it again"
        )
    return numpy.frombuffer(content, dtype=numpy.uint8, offset=head).reshape(shape)


def _read(path: Path) -> bytes:
    try:
        if path.suffix != ".gz":
            return path.read_bytes()
        with gzip.open(path) as file:
            return file.read()
    except EOFError:
        raise ValueError(f"{path} is truncated: the compressed data end too early; fetch it again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a gzip file, or damaged ({error}); fetch it again") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


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
    raise ValueError(
        f"{folder} has no {stem}-idx{dimensions}-ubyte (with or without .gz); a folder of IDX files holds "
        "train-images, train-labels, t10k-images and t10k-labels"
    )
