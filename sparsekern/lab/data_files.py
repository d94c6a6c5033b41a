"""Images and labels in files: ``.npz``, IDX, and the binary version of CIFAR.

Every reader checks what a file asks for before it reads the arrays, and raises an :class:`InputError` that says what is
wrong with which file.
"""

from __future__ import annotations

import gzip
import io
import lzma
import math
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from sparsekern.errors import InputError
from sparsekern.files.size_limits import Limits
from sparsekern.lab.stored import channels_first, read_header

if TYPE_CHECKING:
    import numpy

KEYS = ("train_images", "train_labels", "test_images", "test_labels")
KERAS_KEYS = ("x_train", "y_train", "x_test", "y_test")
"""The same arrays in the files of Keras, such as ``mnist.npz``."""

MOST_CHANNELS = 4

IDX = {"train_images": "train-images", "train_labels": "train-labels"}
IDX |= {"test_images": "t10k-images", "test_labels": "t10k-labels"}
"""Beginnings of the names of the four IDX files of MNIST and Fashion-MNIST."""

PIXELS = 3 * 32 * 32
"""Bytes of an image of CIFAR: its red, then its green, then its blue pixels, row by row."""

LARGEST_FILE = 2**28
"""Bytes that are read of a file of CIFAR, at most; the largest one, CIFAR-100's training images, has 0.6 of it."""

Arrays = dict[str, "numpy.ndarray"]
Shapes = dict[str, tuple[int, ...]]


def check_shapes(source: Path, shapes: Shapes) -> None:
    """Check that arrays fit together, before they are read."""
    for part in ("train", "test"):
        images, labels = shapes[f"{part}_images"], shapes[f"{part}_labels"]
        if images[0] != labels[0]:
            raise InputError(
                f"{source} has {images[0]} {part} images but {labels[0]} {part} labels; there must be one an image"
            )
        if 0 in images:
            raise InputError(
                f"{source} has an empty {part} set: its images have shape {images}; there must be at least one"
            )


def _check_memory(source: Path, shapes: Shapes, file_bytes: int, limits: Limits) -> None:
    """Check that arrays fit together and into memory, before they are read."""
    check_shapes(source, shapes)
    wanted = sum(math.prod(shape) * (8 if len(shape) == 1 else 4) for shape in shapes.values())
    limits.check_bytes(source, wanted, file_bytes)


def read_npz(path: Path, limits: Limits) -> Arrays:
    """Read an ``.npz`` file with the arrays of :data:`KEYS` or :data:`KERAS_KEYS`.

    Images are ``(N, H, W)`` or ``(N, H, W, C)`` uint8, labels ``(N,)`` of any integer dtype.

    Returns:
        The arrays by :data:`KEYS`, the images as ``(N, C, H, W)``.
    """
    import numpy

    try:
        headers = _npy_headers(path)
    except Exception:  # a damaged file makes the readers raise anything, in words that are no help
        raise _damaged_npz(path) from None
    names = KERAS_KEYS if set(KERAS_KEYS) <= headers.keys() else KEYS
    if absent := [name for name in names if name not in headers]:
        raise InputError(
            f"{path} has no array {', '.join(absent)}; it must have {', '.join(KEYS)}, or {', '.join(KERAS_KEYS)}"
        )
    for key, name in zip(KEYS, names, strict=True):
        check_array(path, key, *headers[name])
    shapes = {key: headers[name][0] for key, name in zip(KEYS, names, strict=True)}
    _check_memory(path, shapes, path.stat().st_size, limits)
    try:
        with numpy.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[name] for key, name in zip(KEYS, names, strict=True)}
    except Exception:
        raise _damaged_npz(path) from None
    for key in KEYS[::2]:
        arrays[key] = channels_first(arrays[key])
    return arrays


def _damaged_npz(path: Path) -> InputError:
    return InputError(
        f"data is {path}, which is damaged or no .npz file; write one with numpy.savez, of plain arrays "
        f"{', '.join(KEYS)}",
        parameter="data",
    )


def _npy_headers(path: Path) -> dict[str, tuple[tuple[int, ...], numpy.dtype[Any]]]:
    """Return shape and dtype of the known arrays in a file, by name, without reading the arrays."""
    headers = {}
    with zipfile.ZipFile(path) as archive:
        for name in {*KEYS, *KERAS_KEYS} & {entry.removesuffix(".npy") for entry in archive.namelist()}:
            with archive.open(f"{name}.npy") as file:
                shape, _, dtype = read_header(file)
            if dtype.hasobject or any(side < 0 for side in shape):
                raise InputError("no plain array")
            headers[name] = shape, dtype
    return headers


def check_array(path: Path, key: str, shape: tuple[int, ...], dtype: numpy.dtype[Any]) -> None:
    """Check that an array is one of images or of labels, as its name says."""
    if "labels" in key:
        if dtype.kind not in "iu" or len(shape) != 1:
            raise InputError(f"{key} in {path} is {dtype} of shape {shape}; it must be integers of shape (images,)")
        return
    if dtype.name != "uint8" or len(shape) not in (3, 4):
        raise InputError(
            f"{key} in {path} is {dtype} of shape {shape}; it must be uint8 of shape (images, height, width) or "
            "(images, height, width, channels)"
        )
    if len(shape) == 4 and shape[3] > MOST_CHANNELS:
        raise InputError(
            f"{key} in {path} has shape {shape}: {shape[3]} channels, and at most {MOST_CHANNELS} are read; the "
            "channels come last"
        )


def read_idx(folder: Path, limits: Limits) -> Arrays:
    """Read a folder of IDX files, named as those of MNIST: ``<stem>-idx<n>-ubyte``, ``.idx`` for ``-idx``, ``.gz``.

    Returns:
        The arrays by :data:`KEYS`, the images as ``(N, 1, H, W)``.
    """
    files = {key: _find_idx(folder, stem, 3 if "images" in key else 1) for key, stem in IDX.items()}
    shapes = {key: _idx_shape(path, 3 if "images" in key else 1) for key, path in files.items()}
    _check_memory(folder, shapes, sum(path.stat().st_size for path in files.values()), limits)
    arrays = {key: _idx_array(path, shapes[key]) for key, path in files.items()}
    return arrays | {key: arrays[key][:, None] for key in KEYS[::2]}


def _find_idx(folder: Path, stem: str, axes: int) -> Path:
    names = (f"{stem}{separator}idx{axes}-ubyte{suffix}" for suffix in ("", ".gz") for separator in "-.")
    for path in (folder / name for name in names):
        if path.is_file():
            return path
    raise InputError(
        f"{folder} has no {stem}-idx{axes}-ubyte (with or without .gz); a folder of IDX files holds "
        f"{', '.join(IDX.values())}"
    )


@contextmanager
def _open_idx(path: Path) -> Iterator[io.BufferedIOBase]:
    """Open an IDX file, gzipped or not; an error of its reader becomes one sentence."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield file
    except EOFError:
        raise InputError(f"{path} is truncated: the compressed data end too early; fetch it again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path} is not a gzip file, or damaged ({error}); fetch it again") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def _idx_shape(path: Path, axes: int) -> tuple[int, ...]:
    """Return the shape in the header: two bytes of zero, 8 for uint8, the number of axes, each size as a uint32."""
    with _open_idx(path) as file:
        head = file.read(4 + 4 * axes)
    magic, wanted = head[:4], bytes([0, 0, 8, axes])
    if len(head) >= 4 and magic != wanted:
        raise InputError(
            f"{path} begins with magic number 0x{magic.hex()}; an IDX file of {'images' if axes == 3 else 'labels'} "
            f"begins with 0x{wanted.hex()}"
        )
    if len(head) < 4 + 4 * axes:
        raise InputError(f"{path} is truncated: it has {len(head)} bytes, fewer than the header; fetch it again")
    return tuple(int.from_bytes(head[at : at + 4], "big") for at in range(4, len(head), 4))


def _idx_array(path: Path, shape: tuple[int, ...]) -> numpy.ndarray:
    """Return the uint8 array behind the header. One byte more is read than the shape says, to see if more follows."""
    import numpy

    size = math.prod(shape)
    with _open_idx(path) as file:
        file.read(4 + 4 * len(shape))
        content = file.read(size + 1)
    if len(content) != size:
        follows = f"{len(content)} follow" if len(content) < size else "more follow"
        raise InputError(
            f"{path} is {'truncated' if len(content) < size else 'damaged'}: its header promises "
            f"{' x '.join(map(str, shape))} = {size} bytes, {follows}; fetch it again"
        )
    return numpy.frombuffer(content, dtype=numpy.uint8).reshape(shape)


@dataclass(frozen=True)
class Cifar:
    """The binary version of one of the two data sets, whose files are records of an image each.

    Attributes:
        name: of the data set.
        files: with training images, and last the one with test images.
        classes: labels are 0 to ``classes - 1``.
        head: bytes before the pixels of a record; the last of them is the label (of CIFAR-100, the fine one).
    """

    name: str
    files: tuple[str, ...]
    classes: int
    head: int


CIFAR = (
    Cifar("CIFAR-10", (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"), 10, 1),
    Cifar("CIFAR-100", ("train.bin", "test.bin"), 100, 2),
)

CIFAR_FILES = {name for form in CIFAR for file in form.files for name in (file, file.removesuffix(".bin"))}
"""Names of the files of both versions: binary, and without a suffix the pickles of the python version."""


def read_cifar(path: Path, limits: Limits) -> Arrays:
    """Read the binary version of CIFAR-10 or CIFAR-100.

    Args:
        path: a folder, or a tar archive, compressed or not. Nothing is unpacked to the disk.
        limits: what the files of an archive may ask for.

    Returns:
        The arrays by :data:`KEYS`, the images as ``(N, 3, 32, 32)``.
    """
    import numpy

    contents = _folder_contents(path) if path.is_dir() else _tar_contents(path, limits)
    form = next((form for form in CIFAR if contents.keys() & {*form.files}), None)
    if form is None:
        for form in CIFAR:
            if contents.keys() & {name.removesuffix(".bin") for name in form.files}:
                raise InputError(
                    f"{path} holds {form.name} as Python pickles, which can run any code when they are read; fetch the "
                    f"binary version, {form.name.lower()}-binary.tar.gz",
                    parameter="data",
                )
        raise InputError(f"{path} has no file of CIFAR-10 or CIFAR-100, such as data_batch_1.bin or train.bin")
    if absent := [name for name in form.files if name not in contents]:
        raise InputError(f"{path} has no {', '.join(absent)}; {form.name} has {', '.join(form.files)}")
    parts = [_cifar_arrays(form, contents[name], f"{path}: {name}") for name in form.files]
    train = (numpy.concatenate(arrays) for arrays in zip(*parts[:-1], strict=True))
    return dict(zip(KEYS, (*train, *parts[-1]), strict=True))


def _folder_contents(folder: Path) -> dict[str, bytes]:
    contents = {}
    for name in CIFAR_FILES:
        if (folder / name).is_file():
            try:
                with (folder / name).open("rb") as file:
                    contents[name] = file.read(LARGEST_FILE if name.endswith(".bin") else 0)
            except OSError as error:
                raise InputError(f"{folder / name} cannot be read: {error.strerror}") from None
    return contents


def _tar_contents(path: Path, limits: Limits) -> dict[str, bytes]:
    contents, size = {}, 0
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                file = archive.extractfile(member) if name in CIFAR_FILES and member.isfile() else None
                if file is not None:
                    length = min(member.size, LARGEST_FILE) if name.endswith(".bin") else 0
                    size += length
                    limits.check_bytes(path, 4 * size, path.stat().st_size)
                    contents[name] = file.read(length)
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError):
        raise InputError(
            f"data is {path}, which is damaged or no tar archive; fetch it again", parameter="data"
        ) from None
    return contents


def _cifar_arrays(form: Cifar, content: bytes, source: str) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return images ``(N, 3, 32, 32)`` and labels ``(N,)`` of one file."""
    import numpy

    record = form.head + PIXELS
    if not content or len(content) % record:
        raise InputError(
            f"{source} is truncated or damaged: it has {len(content)} bytes, not a multiple of the {record} of an "
            f"image of {form.name}; fetch it again"
        )
    records = numpy.frombuffer(content, dtype=numpy.uint8).reshape(-1, record)
    labels = records[:, form.head - 1].astype("int64")
    if labels.max() >= form.classes:
        raise InputError(f"{source} has label {labels.max()}; those of {form.name} are 0 to {form.classes - 1}")
    return records[:, form.head :].reshape(-1, 3, 32, 32), labels
