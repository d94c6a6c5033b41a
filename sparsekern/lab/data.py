"""Data sets of images: scikit-learn's digits, CIFAR, an ``.npz`` file, a folder of IDX or of ``.npy`` files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsekern.errors import InputError
from sparsekern.files.size_limits import DEFAULT, Limits
from sparsekern.lab.data_files import (
    CIFAR_FILES,
    KEYS,
    Arrays,
    check_array,
    check_shapes,
    read_cifar,
    read_idx,
    read_npz,
)
from sparsekern.lab.stored import Rows, StoredImages, StoredLabels, measured

if TYPE_CHECKING:
    import numpy

TEST_FRACTION = 0.2
"""Of each class of the digits, which come without a split of their own."""

ARCHIVES = (".tar.gz", ".tgz", ".tar")

KINDS = "an .npz file, CIFAR (binary version) as a folder or .tar.gz, or a folder of .npy or IDX files"


@dataclass(frozen=True)
class Dataset:
    """Images, each channel standardised by its mean and standard deviation in the training set.

    They are in memory, or on the disk, from where an index reads some.

    Attributes:
        name: for titles.
        train_images: ``(N, C, H, W)`` float32.
        train_labels: ``(N,)`` int64, 0 to ``classes - 1``.
        test_images: ``(M, C, H, W)`` float32.
        test_labels: ``(M,)`` int64.
        classes: one more than the largest label.
        digest: SHA-256 of the raw arrays, by which a resumed run checks that it has the same data; of many images on
            the disk it sees evenly spaced ones (:func:`~sparsekern.lab.stored.measured`).
    """

    name: str
    train_images: Tensor | StoredImages
    train_labels: Tensor | StoredLabels
    test_images: Tensor | StoredImages
    test_labels: Tensor | StoredLabels
    classes: int
    digest: str

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)``."""
        _, channels, height, width = self.train_images.shape
        return channels, height, width

    def to(self, device: torch.device) -> Dataset:
        """Return the data set on a device."""
        return replace(self, **{key: getattr(self, key).to(device) for key in KEYS})

    def describe(self) -> dict[str, Any]:
        """Return the description of the data for ``config.json``."""
        return {
            "name": self.name,
            "train_images": self.train_images.shape[0],
            "test_images": self.test_images.shape[0],
            "image_shape": list(self.image_shape),
            "classes": self.classes,
            "sha256": self.digest,
        }


def load(path: str | None = None, max_gib: float = DEFAULT.gib) -> Dataset:
    """Load a data set.

    Args:
        path: None for the digits of scikit-learn; an ``.npz`` file (:func:`~sparsekern.lab.data_files.read_npz`); the
            binary version of CIFAR-10 or CIFAR-100 as a folder or a ``.tar.gz``; a folder with the four IDX files of
            MNIST or Fashion-MNIST, gzipped or not; or a folder with the arrays of such an ``.npz`` file as four
            ``.npy`` files, which stay on the disk.
        max_gib: GiB of memory that the images, as float32, and the labels may take. Those of large files may take 16
            times the size of the files.

    Raises:
        ValueError: the data are missing, damaged, too large or inconsistent; the text says what and where.
    """
    if path is None:
        return _dataset("digits (scikit-learn)", "the digits of scikit-learn", _digits())
    source, limits = Path(path), Limits(max_gib, option="data_max_gib")
    if not source.exists():
        raise InputError(f"data is {path}, which does not exist; give {KINDS}", parameter="data")
    if source.is_dir() and (source / f"{KEYS[0]}.npy").is_file():
        return _stored(source)
    if source.is_dir():
        read = read_cifar if any((source / name).is_file() for name in CIFAR_FILES) else read_idx
        return _dataset(source.resolve().name, path, read(source, limits))
    if source.name.endswith(ARCHIVES):
        return _dataset(source.name.partition(".tar")[0].removesuffix(".tgz"), path, read_cifar(source, limits))
    if source.suffix == ".npz":
        return _dataset(source.stem, path, read_npz(source, limits))
    raise InputError(
        f"data is {path}, a file that does not end in .npz, {', '.join(ARCHIVES)}; give {KINDS}", parameter="data"
    )


def _digits() -> Arrays:
    """Return the digits, split at random in each class, with a generator of its own: the split is always the same."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 1, 8, 8)
    test = torch.zeros(len(labels), dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    for digit in range(10):
        members = torch.from_numpy(labels == digit).nonzero().squeeze(1)
        order = torch.randperm(members.shape[0], generator=generator)
        test[members[order[: round(TEST_FRACTION * members.shape[0])]]] = True
    chosen = test.numpy()
    return dict(zip(KEYS, (images[~chosen], labels[~chosen], images[chosen], labels[chosen]), strict=True))


def _dataset(name: str, source: str, arrays: Arrays) -> Dataset:
    """Check that the labels fit the images, and turn the arrays into tensors."""
    classes = _classes(source, {key: [array] for key, array in arrays.items()})
    train, test = arrays["train_images"], arrays["test_images"]
    _check_alike(source, train.shape[1:], test.shape[1:])
    train_images, test_images = _standardised(train, test, source)
    train_labels, test_labels = (torch.from_numpy(arrays[key].astype("int64")) for key in KEYS[1::2])
    digest = hashlib.sha256()
    for key in KEYS:
        digest.update(arrays[key].tobytes())  # in the order of the axes, whatever the order in memory
    return Dataset(name, train_images, train_labels, test_images, test_labels, classes, digest.hexdigest())


def _stored(folder: Path) -> Dataset:
    """Check four ``.npy`` files, and return the data set that reads them."""
    rows = {key: Rows.open(folder / f"{key}.npy") for key in KEYS}
    for key, array in rows.items():
        check_array(array.path, key, array.shape, array.dtype)
    check_shapes(folder, {key: array.shape for key, array in rows.items()})
    classes = _classes(str(folder), {key: rows[key].pieces() for key in KEYS[1::2]})
    digest, cpu = hashlib.sha256(), torch.device("cpu")
    mean, deviation = measured(rows["train_images"], digest.update)
    if not bool(deviation.any()):
        raise InputError(f"{folder} has train images in which all pixels are equal; there is nothing to learn from")
    _see(rows["train_labels"], digest.update)
    measured(rows["test_images"], digest.update)
    _see(rows["test_labels"], digest.update)
    deviation[deviation == 0] = 1.0
    mean, deviation = (number.float()[:, None, None] for number in (mean, deviation))
    train, test = (StoredImages(rows[key], mean, deviation, cpu) for key in KEYS[::2])
    _check_alike(str(folder), train.shape[1:], test.shape[1:])
    labels = [StoredLabels(rows[key], cpu) for key in KEYS[1::2]]
    return Dataset(folder.resolve().name, train, labels[0], test, labels[1], classes, digest.hexdigest())


def _see(labels: Rows, see: Callable[[bytes], None]) -> None:
    for piece in labels.pieces():
        see(piece.tobytes())


def _check_alike(source: str, train: tuple[int, ...], test: tuple[int, ...]) -> None:
    """Raise ValueError if train and test images are of other shapes."""
    if train != test:
        raise InputError(f"{source} has train images of shape {(*train,)}, test images of {(*test,)}")


def _classes(source: str, labels: Mapping[str, Iterable[numpy.ndarray]]) -> int:
    """Check labels, which come in pieces, and return the number of classes.

    Raises:
        ValueError: a label is negative or so large that there are no such classes, there is one class only, or a test
            label is none of a train image.
    """
    import numpy

    known: dict[str, numpy.ndarray] = {}
    count = 0
    for part in ("train", "test"):
        seen = numpy.zeros(0, dtype="int64")
        for piece in labels[f"{part}_labels"]:
            count += len(piece) * (part == "train")
            seen = numpy.union1d(seen, piece.astype("int64"))
        if seen[0] < 0:
            raise InputError(f"{source} has {part} label {seen[0]}; labels are 0 and up")
        known[part] = seen
    if len(known["train"]) < 2:
        raise InputError(f"{source} has train images of 1 class only; there must be 2 or more")
    strange = numpy.setdiff1d(known["test"], known["train"]).tolist()
    if strange:
        raise InputError(f"{source} has test labels that no train image has: {', '.join(map(str, strange[:5]))}")
    classes = int(known["train"][-1]) + 1
    if classes > max(1000, count):
        raise InputError(
            f"{source} has train label {classes - 1} with {count} train images; labels must be 0, 1, 2 and so on"
        )
    return classes


def _standardised(train: numpy.ndarray, test: numpy.ndarray, source: str) -> tuple[Tensor, Tensor]:
    """Return the images as float32, each channel with mean 0 and deviation 1 over the training set."""
    images = [torch.from_numpy(array.astype("float32")) for array in (train, test)]
    deviations = []
    for channel in range(train.shape[1]):  # one at a time: in float64 it takes twice the memory
        pixels = images[0][:, channel].double()
        mean, deviation = pixels.mean(), pixels.std()
        deviations.append(float(deviation))
        for part in images:
            part[:, channel].sub_(mean).div_(deviation if deviation > 0 else 1.0)
    if not any(deviations):
        raise InputError(f"{source} has train images in which all pixels are equal; there is nothing to learn from")
    return images[0], images[1]
