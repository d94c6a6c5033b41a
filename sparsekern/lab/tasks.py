"""Tasks: what a network is trained on. A recipe names its task; the training loop knows none of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from sparsekern.errors import InputError
from sparsekern.lab.data import Dataset, load
from sparsekern.lab.stored import Shuffled

if TYPE_CHECKING:
    from sparsekern.lab.recipes import Recipe


@dataclass(frozen=True)
class Metric:
    """A measure of a network on test data. Tables, pictures and pages take its words and units from here.

    Attributes:
        key: its entry in a row of ``metrics.jsonl`` and in the results of a network.
        gap: its entry in a comparison of two networks, the first minus the second.
        name: without the "test" of :attr:`title`.
        unit: of the number as it is written.
        scale: the number as it is written, over the number as it is stored.
        difference: the unit of a difference of two such numbers.
        higher_is_better: whether more of it is better.
        examples: the entry of a data set's description that counts what it is measured on, such as "test_images".
        digits: behind the point while a network trains, where there is little room.
        loss: name and scale of the training loss as it is shown while a network trains.
    """

    key: str
    gap: str
    name: str
    unit: str
    scale: float
    difference: str
    higher_is_better: bool
    examples: str
    digits: int = 1
    loss: tuple[str, float] = ("loss", 1.0)

    @property
    def title(self) -> str:
        """Name in a table, such as "test accuracy"."""
        return f"test {self.name}"

    @property
    def label(self) -> str:
        """Name and unit for an axis, such as "test accuracy (%)"."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    def text(self, stored: float, digits: int = 2) -> str:
        """Return a stored number as it is written, such as "97.77 %"."""
        return f"{self.scale * stored:.{digits}f} {self.unit}".rstrip()

    def gap_text(self, gap: float, error: float | None = None) -> str:
        """Return a stored difference, and its standard error, as they are written, such as "+0.21 ± 0.10 points"."""
        spread = "" if error is None else f" ± {self.scale * error:.2f}"
        return f"{self.scale * gap:+.2f}{spread} {self.difference}".rstrip()


ACCURACY = Metric(
    key="test_accuracy",
    gap="accuracy_gap",
    name="accuracy",
    unit="%",
    scale=100,
    difference="points",
    higher_is_better=True,
    examples="test_images",
)

BITS_PER_BYTE = Metric(
    key="bits_per_byte",
    gap="bits_per_byte_gap",
    name="bits per byte",
    unit="",
    scale=1,
    difference="",
    higher_is_better=False,
    examples="held_out_bytes",
    digits=2,
    loss=("bits per byte", 1 / math.log(2)),
)

METRICS = (ACCURACY, BITS_PER_BYTE)


def metric_of(entries: Container[str]) -> Metric:
    """Return the metric that a row of a run, or the results of a network, has."""
    return next(metric for metric in METRICS if metric.key in entries)


AUGMENTATIONS = ("none", "crop", "crop-flip")

MARGIN = 4
"""Pixels of padding on each side before the crop (He et al. 2016, section 4.2)."""

EVALUATION_BATCH = 512

Batch = tuple[Tensor, Tensor]
"""Inputs ``(B, ...)`` and targets ``(B, ...)``."""


class Task(ABC):
    """Training and test data, with the loss and the metric of a network on them.

    A task is loaded by :meth:`load` and made ready for one run by :meth:`prepared`. Both networks of a run share it, so
    it keeps no state of a training.

    Attributes:
        metric: the number by which networks are judged.
        examples: size of the training set.
    """

    metric: ClassVar[Metric]
    examples: int

    @classmethod
    @abstractmethod
    def load(cls, path: str | None, max_gib: float) -> Task:
        """Load the data from a path, or the task's default data.

        Raises:
            ValueError: the data are missing, damaged or too large.
        """

    @classmethod
    @abstractmethod
    def noise(cls, described: Mapping[str, Any], examples: int) -> Task:
        """Return a task of random data with the shapes that :meth:`describe` returned, to measure a network on."""

    @staticmethod
    @abstractmethod
    def examples_of(described: Mapping[str, Any]) -> int:
        """Return :attr:`examples` of the data that :meth:`describe` described."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return what ``config.json`` says about the data. A resumed run compares it."""

    def augmentation(self, recipe: Recipe) -> str:
        """Return how the examples are varied where the user does not say."""
        return recipe.augmentation

    @abstractmethod
    def prepared(self, recipe: Recipe, network: Mapping[str, Any], augment: str, device: torch.device) -> Task:
        """Return the task as a run needs it, its data on the device.

        Args:
            recipe: of the run.
            network: options of its network.
            augment: how the examples are varied.
            device: of the training.

        Raises:
            ValueError: the data do not fit the recipe's network.
        """

    @abstractmethod
    def model_arguments(self) -> dict[str, Any]:
        """Return the arguments of the recipe's network that the data decide."""

    @abstractmethod
    def order(self, generator: torch.Generator) -> Any:
        """Return the order of the training examples in one epoch, for :meth:`batch`."""

    @abstractmethod
    def batch(self, order: Any, number: int, size: int, generator: torch.Generator) -> Batch:
        """Return a batch of an epoch.

        Args:
            order: of the epoch.
            number: of the batch, from 0.
            size: examples of a batch; the last one of an epoch may have fewer.
            generator: for all that is random in the batch.
        """

    def example(self, size: int = 1) -> Batch:
        """Return some batch of that size, the same at each call, for what depends on its shape."""
        generator = torch.Generator().manual_seed(0)
        return self.batch(self.order(generator), 0, size, generator)

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean loss ``()`` of a batch."""

    @abstractmethod
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return the metric of a network in evaluation mode, and what else a row of ``metrics.jsonl`` shall hold."""

    def tokens(self, examples: int) -> int | None:
        """Return the tokens of that many examples, for tasks whose speed is given in tokens a second."""
        return None

    def written(self, model: nn.Module) -> str | None:
        """Return a text that the network writes; None if it writes none."""
        return None


@dataclass(frozen=True)
class Classification(Task):
    """Classes of images, judged by the accuracy on test images.

    Attributes:
        data: the images.
        augment: one of :data:`AUGMENTATIONS`.
        memory_format: of the batches.
        label_smoothing: part of the target that all classes share.
    """

    metric = ACCURACY

    data: Dataset
    augment: str = "none"
    memory_format: torch.memory_format = torch.contiguous_format
    label_smoothing: float = 0.0

    @classmethod
    def load(cls, path: str | None, max_gib: float) -> Classification:
        """Load the data set; see :func:`sparsekern.lab.data.load`."""
        return cls(load(path, max_gib))

    @classmethod
    def noise(cls, described: Mapping[str, Any], examples: int) -> Classification:
        """Return a task of normally distributed images."""
        count, classes = min(examples, described["train_images"]), described["classes"]
        images = torch.randn(count, *described["image_shape"], generator=torch.Generator().manual_seed(0))
        labels = torch.arange(count) % classes
        return cls(Dataset("noise", images, labels, images[:1], labels[:1], classes, ""))

    @staticmethod
    def examples_of(described: Mapping[str, Any]) -> int:
        """Return the number of training images."""
        return int(described["train_images"])

    @property
    def examples(self) -> int:  # type: ignore[override]
        """Number of training images."""
        return self.data.train_images.shape[0]

    def describe(self) -> dict[str, Any]:
        """Return name, shapes and checksum of the data set."""
        return self.data.describe()

    def augmentation(self, recipe: Recipe) -> str:
        """Return the recipe's; of grey images none, as a mirrored digit may mean something else."""
        return recipe.augmentation if self.data.image_shape[0] > 1 else "none"

    def prepared(
        self, recipe: Recipe, network: Mapping[str, Any], augment: str, device: torch.device
    ) -> Classification:
        """Return the task with the recipe's settings; raise ValueError if the images are too small for its network."""
        height, width = self.data.image_shape[1:]
        side = recipe.smallest_image
        if min(height, width) < side:
            raise InputError(
                f"data has images of {height} x {width}; recipe {recipe.name} needs {side} x {side} or more: "
                "choose another",
                parameter="data",
            )
        return replace(
            self,
            data=self.data.to(device),
            augment=augment,
            memory_format=torch.channels_last if recipe.channels_last else torch.contiguous_format,
            label_smoothing=recipe.label_smoothing,
        )

    def model_arguments(self) -> dict[str, Any]:
        """Return the number of classes and of channels, and the size of an image."""
        channels, height, width = self.data.image_shape
        return {"num_classes": self.data.classes, "in_channels": channels, "image_size": (height, width)}

    def order(self, generator: torch.Generator) -> Tensor | Shuffled:
        """Return the places of all training images ``(N,)`` in a random order; of images on the disk without a list."""
        images = self.data.train_images
        if not isinstance(images, Tensor):
            return Shuffled(self.examples, generator)
        return torch.randperm(self.examples, generator=generator).to(images.device)

    def batch(self, order: Tensor | Shuffled, number: int, size: int, generator: torch.Generator) -> Batch:
        """Return images ``(B, C, H, W)``, varied, and labels ``(B,)``."""
        chosen = order[number * size : (number + 1) * size]
        images = augmented(self.data.train_images[chosen], self.augment, generator)
        return images.contiguous(memory_format=self.memory_format), self.data.train_labels[chosen]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy ``()``."""
        images, labels = batch
        return cross_entropy(model(images).float(), labels, label_smoothing=self.label_smoothing)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return the accuracy on the test images."""
        right = 0
        for start in range(0, self.data.test_labels.shape[0], EVALUATION_BATCH):
            images = self.data.test_images[start : start + EVALUATION_BATCH]
            images = images.contiguous(memory_format=self.memory_format)
            labels = self.data.test_labels[start : start + EVALUATION_BATCH]
            right += int((model(images).argmax(1) == labels).sum())
        return {self.metric.key: right / self.data.test_labels.shape[0]}


def augmented(images: Tensor, augmentation: str, generator: torch.Generator) -> Tensor:
    """Return every image shifted by up to 4 pixels in each direction and, with ``"crop-flip"``, mirrored or not.

    Pixels from outside are 0, the mean of standardised images.

    Args:
        images: ``(N, C, H, W)``; not changed.
        augmentation: one of :data:`AUGMENTATIONS`; ``"none"`` returns the images as they are.
        generator: on the CPU, so that every device draws alike.

    Returns:
        A tensor of the shape and dtype of ``images``, its channels last in memory if anything was drawn.
    """
    if augmentation == "none":
        return images
    count, _, height, width = images.shape
    down, right = torch.randint(2 * MARGIN + 1, (2, count, 1), generator=generator)
    rows, columns = down + torch.arange(height), right + torch.arange(width)  # (N, H), (N, W)
    if augmentation == "crop-flip":
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    at = (torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :])
    padded = pad(images, (MARGIN,) * 4).permute(0, 2, 3, 1)
    return padded[tuple(axis.to(images.device) for axis in at)].permute(0, 3, 1, 2)
