"""The learning rate over a training, as a fraction of its highest value. Places are fractions of the training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol


class Schedule(Protocol):
    """What fraction of the highest learning rate a step has."""

    def factor(self, step: int, steps: int) -> float:
        """Return the fraction for step ``step`` (the first is 0) of ``steps``."""
        ...


@dataclass(frozen=True)
class Constant:
    """The same rate throughout."""

    def factor(self, step: int, steps: int) -> float:
        """Return 1."""
        return 1.0


@dataclass(frozen=True)
class Cosine:
    """Down to 0 along half a cosine: Loshchilov and Hutter, "SGDR", ICLR 2017, equation 5, without restarts.

    Attributes:
        warm_up: the part of the training in which the rate rises in a line, before the cosine.
    """

    warm_up: float = 0.0

    def factor(self, step: int, steps: int) -> float:
        """Return the fraction for step ``step`` of ``steps``."""
        rising = round(self.warm_up * steps)
        if step < rising:
            return (step + 1) / rising
        return (1 + math.cos(math.pi * (step - rising) / (steps - rising))) / 2


@dataclass(frozen=True)
class Milestones:
    """Multiplied by ``drop`` at each milestone.

    Attributes:
        at: the milestones, such as (0.5, 0.75).
        drop: such as 0.1.
        warm_up: the part of the training in which the rate rises in a line; ends before the first milestone.
    """

    at: tuple[float, ...]
    drop: float
    warm_up: float = 0.0

    def factor(self, step: int, steps: int) -> float:
        """Return the fraction for step ``step`` of ``steps``."""
        rising = round(self.warm_up * steps)
        if step < rising:
            return (step + 1) / rising
        return self.drop ** sum(step >= round(place * steps) for place in self.at)
