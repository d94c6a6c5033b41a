"""Data sets that stay on the disk: arrays in ``.npy`` files, of which a batch reads its rows.

Memory does not grow with the files, nor does that of the random order in which they are read.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsekern.errors import InputError

if TYPE_CHECKING:
    import numpy

PIECE = 2**22
"""Bytes that are read at a time where all rows are, at least one row."""

MOST = 2**14
"""Images, at most, from which mean, deviation and checksum are taken: evenly spaced ones of larger sets."""

ROUNDS = 6
"""Of the permutation. Four make a Feistel network of random functions one that cannot be told from random."""


@dataclass(frozen=True)
class Rows:
    """The rows of an array in a ``.npy`` file.

    Attributes:
        path: the file.
        shape: of the array.
        dtype: of the array.
        start: byte of the file at which the array begins.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: Any
    start: int

    @classmethod
    def open(cls, path: Path) -> Rows:
        """Read the header of a file.

        Raises:
            ValueError: it is no such file, too short, or of an array that is not plain or not in C order.
        """
        try:
            with path.open("rb") as file:
                shape, fortran, dtype = read_header(file)
                start, end = file.tell(), file.seek(0, os.SEEK_END)
        except Exception:
            raise InputError(f"{path} is no .npy file; write it with numpy.save") from None
        if fortran or dtype.hasobject or not shape or min(shape) < 0:
            raise InputError(f"{path} holds no plain array in C order; write it with numpy.save, of such an array")
        if end - start < math.prod(shape) * dtype.itemsize:
            raise _shorter(path)
        return cls(path, shape, dtype, start)

    def read(self, places: slice | Sequence[int]) -> numpy.ndarray:
        """Return a copy of some rows.

        Raises:
            ValueError: the file is shorter than its header says.
        """
        import numpy

        chosen = range(*places.indices(self.shape[0])) if isinstance(places, slice) else places
        width = math.prod(self.shape[1:]) * self.dtype.itemsize
        found = numpy.empty((len(chosen), width), dtype="uint8")
        together = isinstance(chosen, range) and chosen.step == 1
        try:
            with self.path.open("rb", buffering=0) as file:
                for first, rows in zip(chosen, [found] if together else found, strict=False):
                    file.seek(self.start + first * width)
                    if file.readinto(rows) != rows.nbytes:
                        raise EOFError
        except (OSError, EOFError):
            raise _shorter(self.path) from None
        rows_read: numpy.ndarray = found.view(self.dtype).reshape(-1, *self.shape[1:])
        return rows_read

    def pieces(self, step: int = 1) -> Iterator[numpy.ndarray]:
        """Yield every ``step``-th row, some at a time."""
        width = math.prod(self.shape[1:]) * self.dtype.itemsize
        count = max(1, PIECE // width) * step
        for first in range(0, self.shape[0], count):
            yield self.read(slice(first, first + count, step))


def read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, numpy.dtype[Any]]:
    """Return shape, whether it is in Fortran's order, and dtype of the array in a ``.npy`` file.

    Of a damaged file it raises anything.
    """
    from numpy.lib import format as npy

    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    header: tuple[tuple[int, ...], bool, numpy.dtype[Any]] = readers[npy.read_magic(file)](file)
    return header


def _shorter(path: Path) -> InputError:
    return InputError(f"{path} is shorter than its header says, or gone; restore it")


@dataclass(frozen=True)
class StoredImages:
    """Images in a ``.npy`` file, uint8 ``(N, H, W)`` or ``(N, H, W, C)``, standardised as they are read.

    An index, a slice or the places of some images, returns these: ``(n, C, H, W)`` float32 on the device.

    Attributes:
        rows: of the file.
        mean, deviation: ``(C, 1, 1)`` float32, of each channel.
        device: of what is returned.
    """

    rows: Rows
    mean: Tensor
    deviation: Tensor
    device: torch.device

    @property
    def shape(self) -> torch.Size:
        """``(N, C, H, W)``."""
        count, height, width, *channels = self.rows.shape
        return torch.Size((count, *(channels or (1,)), height, width))

    def to(self, device: torch.device) -> StoredImages:
        """Return the images of the same file on a device."""
        return replace(self, mean=self.mean.to(device), deviation=self.deviation.to(device), device=device)

    def __getitem__(self, places: Tensor | slice) -> Tensor:
        images = channels_first(self.rows.read(places.tolist() if isinstance(places, Tensor) else places))
        return torch.from_numpy(images).to(self.device, torch.float32).sub_(self.mean).div_(self.deviation)


@dataclass(frozen=True)
class StoredLabels:
    """Labels in a ``.npy`` file, ``(N,)`` of any integer dtype; an index returns some, int64, on the device."""

    rows: Rows
    device: torch.device

    @property
    def shape(self) -> torch.Size:
        """``(N,)``."""
        return torch.Size(self.rows.shape)

    def to(self, device: torch.device) -> StoredLabels:
        """Return the labels of the same file on a device."""
        return replace(self, device=device)

    def __getitem__(self, places: Tensor | slice) -> Tensor:
        labels = self.rows.read(places.tolist() if isinstance(places, Tensor) else places)
        return torch.from_numpy(labels.astype("int64")).to(self.device)


def channels_first(images: numpy.ndarray) -> numpy.ndarray:
    """Return images ``(N, H, W)`` or ``(N, H, W, C)`` as a view ``(N, C, H, W)``."""
    return images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)


def measured(images: Rows, see: Callable[[bytes], None]) -> tuple[Tensor, Tensor]:
    """Return mean and deviation ``(C,)`` float64 of the channels of images, of which ``see`` gets the bytes.

    Of more than :data:`MOST` images, those are evenly spaced ones.
    """
    import numpy

    channels = (*images.shape, 1)[3]
    counts = numpy.zeros((channels, 256), dtype="int64")
    for piece in images.pieces(-(-images.shape[0] // MOST)):
        ordered = channels_first(piece)
        see(ordered.tobytes())
        for channel in range(channels):
            counts[channel] += numpy.bincount(ordered[:, channel].ravel(), minlength=256)
    counted, value = torch.from_numpy(counts).double(), torch.arange(256.0, dtype=torch.float64)
    total = counted.sum(1)
    mean = (counted * value).sum(1) / total
    squares = (counted * (value - mean[:, None]).square()).sum(1)
    return mean, (squares / (total - 1).clamp(min=1)).sqrt()


class Shuffled:
    """A random order of ``count`` places, of which any part is computed alone: nothing grows with their number.

    A Feistel network permutes the numbers of an even number of bits (Luby and Rackoff 1988); those that are too large
    are permuted again until they are not (cycle walking, Black and Rogaway 2002). Every device and rank computes the
    same order from the same generator.

    Args:
        count: number of places, 1 or more.
        generator: on the CPU.
    """

    def __init__(self, count: int, generator: torch.Generator) -> None:
        self.count = count
        self._half = max(1, -(-(count - 1).bit_length() // 2))
        self._keys = torch.randint(2**62, (ROUNDS,), generator=generator).tolist()

    def __getitem__(self, part: slice) -> Tensor:
        """Return the places ``(n,)`` int64 of a part of the order."""
        places = self._permuted(torch.arange(*part.indices(self.count)))
        while bool((outside := places >= self.count).any()):
            places[outside] = self._permuted(places[outside])
        return places

    def _permuted(self, numbers: Tensor) -> Tensor:
        left, right = numbers >> self._half, numbers & ((1 << self._half) - 1)
        for key in self._keys:
            mixed = (right + key) * 0x9E3779B97F4A7C1  # overflow wraps, on every device
            mixed = (mixed ^ (mixed >> 29)) * 0xC2B2AE3D27D4EB4
            left, right = right, left ^ ((mixed >> 32) & ((1 << self._half) - 1))
        return (left << self._half) | right
