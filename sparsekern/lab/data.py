"""Data sets: scikit-learn's digits, CIFAR, an ``.npz`` file, a folder of IDX files."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsekern.errors import InputError
from sparsekern.files.size_limits import DEFAULT, Limits
from sparsekern.lab.cifar import is_cifar, read_cifar_folder, read_cifar_tar
from sparsekern.lab.idx import IMAGES, LABELS, find_idx, idx_shape, read_idx
from sparsekern.lab.npz import KEYS, Shapes, read_npz

if TYPE_CHECKING:
    import numpy

TEST_FRACTION = 0.2
"""Of each class of the digits, which come without a split of their own."""

ARCHIVES = (".tar.gz", ".tgz", ".tar")

KINDS = "an .npz file, CIFAR as a folder or .tar.gz, or a folder of IDX files"


@dataclass(frozen=True)
class Dataset:
    """Images, each channel standardised by its mean and standard deviation in the training set.

    Attributes:
        name: for titles.
        train_images: ``(N, C, H, W)`` float32.
        train_labels: ``(N,)`` int64, 0 to ``classes - 1``.
        test_images: ``(M, C, H, W)`` float32.
        test_labels: ``(M,)`` int64.
        classes: one more than the largest label.
        digest: of the raw arrays, so that a resumed run can tell that it has the same data.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int
    digest: str

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)``."""
        _, channels, height, width = self.train_images.shape
        return channels, height, width

    def to(self, device: torch.device) -> Dataset:
        """Return the data set on a device."""
        moved = {key: getattr(self, key).to(device) for key in KEYS}
        return Dataset(self.name, **moved, classes=self.classes, digest=self.digest)

    def describe(self) -> dict[str, Any]:
        """Return what ``config.json`` says about the data."""
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
        path: None for the digits of scikit-learn; an ``.npz`` file (:mod:`sparsekern.lab.npz`); CIFAR-10 or
            CIFAR-100 as a folder or a ``.tar.gz`` (:mod:`sparsekern.lab.cifar`); or a folder with the four IDX
            files of MNIST or Fashion-MNIST, gzipped or not.
        max_gib: GiB that the images, as float32, and the labels may take; those of large files may take 16 times the
            size of the files.

    Raises:
        ValueError: the data are missing, damaged or do not fit together; one sentence says what and where.
    """
    if path is None:
        return _dataset("digits (scikit-learn)", "the digits of scikit-learn", _digits())
    source, limits = Path(path), Limits(max_gib, option="data_max_gib")
    if not source.exists():
        raise InputError(f"data is {path}, which does not exist; give {KINDS}", parameter="data")
    if source.is_dir():
        arrays = read_cifar_folder(source) if is_cifar(source) else _idx_folder(source, path, limits)
        return _dataset(source.resolve().name, path, arrays)
    if source.name.endswith(ARCHIVES):
        archive_bytes = source.stat().st_size
        arrays = read_cifar_tar(source, lambda size: limits.check_bytes(path, 4 * size, archive_bytes))
        return _dataset(source.name.partition(".tar")[0].removesuffix(".tgz"), path, arrays)
    if source.suffix != ".npz":
        raise InputError(
            f"data is {path}, a file that does not end in .npz, {', '.join(ARCHIVES)}; give {KINDS}", parameter="data"
        )
    size = source.stat().st_size
    return _dataset(source.stem, path, read_npz(source, lambda shapes: _check_shapes(path, shapes, size, limits)))


def _digits() -> dict[str, numpy.ndarray]:
    """Return the digits, split class by class at random but always alike, whatever libraries and seeds do elsewhere."""
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


def _idx_folder(folder: Path, source: str, limits: Limits) -> dict[str, numpy.ndarray]:
    parts = (("train-images", IMAGES), ("train-labels", LABELS), ("t10k-images", IMAGES), ("t10k-labels", LABELS))
    files = {key: (find_idx(folder, *part), part[1]) for key, part in zip(KEYS, parts, strict=True)}
    shapes = {key: idx_shape(*file) for key, file in files.items()}
    _check_shapes(source, shapes, sum(path.stat().st_size for path, _ in files.values()), limits)
    arrays = {key: read_idx(*file) for key, file in files.items()}
    return arrays | {key: arrays[key][:, None] for key in KEYS[::2]}


def _check_shapes(source: str, shapes: Shapes, file_bytes: int, limits: Limits) -> None:
    """Raise ValueError if arrays do not fit together, or not into memory; called before they are read."""
    _check_counts(source, shapes)
    wanted = sum(math.prod(shape) * (8 if len(shape) == 1 else 4) for shape in shapes.values())
    limits.check_bytes(source, wanted, file_bytes)


def _check_counts(source: str, shapes: Shapes) -> None:
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


def _dataset(name: str, source: str, arrays: dict[str, numpy.ndarray]) -> Dataset:
    """Check that the arrays fit together, and turn them into tensors."""
    _check_counts(source, {key: array.shape for key, array in arrays.items()})
    for part in ("train", "test"):
        labels = arrays[f"{part}_labels"]
        if labels.min() < 0:
            raise InputError(f"{source} has {part} label {labels.min()}; labels are 0 and up")
    train, test = arrays["train_images"], arrays["test_images"]
    if train.shape[1:] != test.shape[1:]:
        raise InputError(f"{source} has train images of shape {train.shape[1:]}, test images of {test.shape[1:]}")
    train_labels, test_labels = (torch.from_numpy(arrays[key].astype("int64")) for key in KEYS[1::2])
    known = train_labels.unique()
    if known.shape[0] < 2:
        raise InputError(f"{source} has train images of 1 class only; there must be 2 or more")
    if not bool(torch.isin(test_labels, known).all()):
        strange = sorted(set(test_labels.tolist()) - set(known.tolist()))
        raise InputError(f"{source} has test labels that no train image has: {', '.join(map(str, strange[:5]))}")
    train_images, test_images = _standardised(train, test, source)
    digest = hashlib.sha256()
    for key in KEYS:
        digest.update(arrays[key].tobytes())  # in the order of the axes, whatever the order in memory
    classes = int(known.max()) + 1
    if classes > max(1000, len(train)):
        raise InputError(
            f"{source} has train label {classes - 1} with {len(train)} train images; labels must be 0, 1, 2 and so on"
        )
    return Dataset(name, train_images, train_labels, test_images, test_labels, classes, digest.hexdigest())


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
