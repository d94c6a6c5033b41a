"""Data in an ``.npz`` file: training and test images and labels, as plain arrays."""

from __future__ import annotations

import lzma
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy

KEYS = ("train_images", "train_labels", "test_images", "test_labels")
KERAS_KEYS = ("x_train", "y_train", "x_test", "y_test")
"""The same four in the files of Keras, such as ``mnist.npz``."""

MOST_CHANNELS = 4


def read_npz(path: Path) -> dict[str, numpy.ndarray]:
    """Return the arrays by :data:`KEYS`: images ``(N, C, H, W)`` uint8, labels ``(N,)`` integers.

    Raises:
        ValueError: the file is damaged, an array is missing, or one is of another kind; the text says which.
    """
    arrays = _arrays(path)
    for key in KEYS[::2]:
        arrays[key] = _channels_first(arrays[key], key, path)
    for key in KEYS[1::2]:
        if arrays[key].dtype.kind not in "iu" or arrays[key].ndim != 1:
            raise ValueError(
                f"{key} in {path} is {arrays[key].dtype} of shape {arrays[key].shape}; it must be integers of shape "
                "(images,)"
            )
    return arrays


def _arrays(path: Path) -> dict[str, numpy.ndarray]:
    import numpy

    keys = ", ".join(KEYS)
    try:
        content = numpy.load(path, allow_pickle=False)
        if isinstance(content, numpy.ndarray):
            raise ValueError("it is a single array")
        with content as archive:
            names = KERAS_KEYS if set(KERAS_KEYS) <= set(archive) else KEYS
            absent = [name for name in names if name not in archive]
            if not absent:
                return {key: archive[name] for key, name in zip(KEYS, names, strict=True)}
    except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError):
        # numpy's own words are no help: of a text file it says that it could be loaded unsafely
        raise ValueError(
            f"data is {path}, which is damaged or no .npz file; write one with numpy.savez, of plain arrays {keys}"
        ) from None
    raise ValueError(f"{path} has no array {', '.join(absent)}; it must have {keys}, or {', '.join(KERAS_KEYS)}")


def _channels_first(images: numpy.ndarray, key: str, path: Path) -> numpy.ndarray:
    if images.dtype.name != "uint8" or images.ndim not in (3, 4):
        raise ValueError(
            f"{key} in {path} is {images.dtype} of shape {images.shape}; it must be uint8 of shape "
            "(images, height, width) or (images, height, width, channels)"
        )
    if images.ndim == 3:
        return images[:, None]
    if images.shape[3] > MOST_CHANNELS:
        raise ValueError(
            f"{key} in {path} has shape {images.shape}: {images.shape[3]} channels, and at most {MOST_CHANNELS} are "
            "read; the channels come last"
        )
    return images.transpose(0, 3, 1, 2)
