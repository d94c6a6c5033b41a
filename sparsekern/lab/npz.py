"""Data in an ``.npz`` file: training and test images and labels, as plain arrays."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsekern.errors import InputError

if TYPE_CHECKING:
    import numpy

Shapes = dict[str, tuple[int, ...]]
"""Of arrays, by :data:`KEYS`."""

KEYS = ("train_images", "train_labels", "test_images", "test_labels")
KERAS_KEYS = ("x_train", "y_train", "x_test", "y_test")
"""The same four in the files of Keras, such as ``mnist.npz``."""

MOST_CHANNELS = 4


@dataclass(frozen=True)
class Header:
    """What an array says of itself before its numbers."""

    shape: tuple[int, ...]
    dtype: numpy.dtype[Any]


def read_npz(path: Path, check: Callable[[Shapes], None] = lambda shapes: None) -> dict[str, numpy.ndarray]:
    """Return the arrays by :data:`KEYS`: images ``(N, C, H, W)`` uint8, labels ``(N,)`` integers.

    Args:
        path: the file.
        check: gets the shapes of the arrays before any is read, and raises ValueError to refuse them.

    Raises:
        ValueError: the file is damaged, an array is missing, or one is of another kind; the text says which.
    """
    import numpy

    headers = _headers(path)
    names = KERAS_KEYS if set(KERAS_KEYS) <= headers.keys() else KEYS
    if absent := [name for name in names if name not in headers]:
        raise InputError(
            f"{path} has no array {', '.join(absent)}; it must have {', '.join(KEYS)}, or {', '.join(KERAS_KEYS)}"
        )
    for key, name in zip(KEYS, names, strict=True):
        (_check_images if "images" in key else _check_labels)(headers[name], key, path)
    check({key: headers[name].shape for key, name in zip(KEYS, names, strict=True)})
    try:
        with numpy.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[name] for key, name in zip(KEYS, names, strict=True)}
    except Exception:  # whatever a damaged file makes the readers raise; their own words are no help
        raise _damaged(path) from None
    return arrays | {key: _channels_first(arrays[key]) for key in KEYS[::2]}


def _damaged(path: Path) -> ValueError:
    return ValueError(
        f"data is {path}, which is damaged or no .npz file; write one with numpy.savez, of plain arrays "
        f"{', '.join(KEYS)}"
    )


def _headers(path: Path) -> dict[str, Header]:
    """Return the headers of those arrays in a file that may be read, by name."""
    from numpy.lib import format as npy

    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    headers = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in {*KEYS, *KERAS_KEYS} & {entry.removesuffix(".npy") for entry in archive.namelist()}:
                with archive.open(f"{name}.npy") as file:
                    shape, _, dtype = readers[npy.read_magic(file)](file)
                if dtype.hasobject or any(side < 0 for side in shape):
                    raise ValueError
                headers[name] = Header(shape, dtype)
    except Exception:  # whatever a damaged file makes the readers raise; their own words are no help
        raise _damaged(path) from None
    return headers


def _check_images(images: Header, key: str, path: Path) -> None:
    if images.dtype.name != "uint8" or len(images.shape) not in (3, 4):
        raise InputError(
            f"{key} in {path} is {images.dtype} of shape {images.shape}; it must be uint8 of shape "
            "(images, height, width) or (images, height, width, channels)"
        )
    if len(images.shape) == 4 and images.shape[3] > MOST_CHANNELS:
        raise InputError(
            f"{key} in {path} has shape {images.shape}: {images.shape[3]} channels, and at most {MOST_CHANNELS} are "
            "read; the channels come last"
        )


def _check_labels(labels: Header, key: str, path: Path) -> None:
    if labels.dtype.kind not in "iu" or len(labels.shape) != 1:
        raise InputError(
            f"{key} in {path} is {labels.dtype} of shape {labels.shape}; it must be integers of shape (images,)"
        )


def _channels_first(images: numpy.ndarray) -> numpy.ndarray:
    return images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
