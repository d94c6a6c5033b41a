"""The number by which networks are judged: how it is called, stored and written."""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import dataclass


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
