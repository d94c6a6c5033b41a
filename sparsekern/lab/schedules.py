"""Schedules of the learning rate, in fractions of the training."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Constant:
    """The same learning rate throughout. Base of the other schedules.

    Attributes:
        warm_up: the part of the training in which the rate rises linearly, before the schedule begins.
    """

    warm_up: float = field(default=0.0, kw_only=True)

    def factor(self, step: int, steps: int) -> float:
        """Return the rate of step ``step`` (the first is 0) of ``steps``, as a fraction of the highest rate."""
        rising = round(self.warm_up * steps)
        return (step + 1) / rising if step < rising else self._after(step, steps, rising)

    def _after(self, step: int, steps: int, rising: int) -> float:
        return 1.0


@dataclass(frozen=True)
class Cosine(Constant):
    """Down to 0 along half a cosine: Loshchilov and Hutter, "SGDR", ICLR 2017, equation 5, without restarts.

    Attributes:
        floor: where it ends, as a fraction of the highest rate.
    """

    floor: float = 0.0

    def _after(self, step: int, steps: int, rising: int) -> float:
        falling = (1 + math.cos(math.pi * (step - rising) / (steps - rising))) / 2
        return self.floor + (1 - self.floor) * falling


@dataclass(frozen=True)
class Milestones(Constant):
    """Multiplied by ``drop`` at each milestone.

    Attributes:
        at: the milestones, such as (0.5, 0.75); the warm-up ends before the first.
        drop: such as 0.1.
    """

    at: tuple[float, ...]
    drop: float

    def _after(self, step: int, steps: int, rising: int) -> float:
        return self.drop ** sum(step >= round(place * steps) for place in self.at)


@dataclass(frozen=True)
class FineTuning(Constant):
    """Another schedule for a part of the training, then a low rate to the end.

    Attributes:
        first: the schedule of the part.
        until: where the part ends, such as 0.9.
        rate: of the rest, as a fraction of the highest rate.
    """

    first: Constant
    until: float
    rate: float

    def _after(self, step: int, steps: int, rising: int) -> float:
        end = round(self.until * steps)
        return self.first.factor(step, end) if step < end else self.rate
