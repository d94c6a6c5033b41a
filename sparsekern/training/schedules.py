"""When blocks move, and what fraction of them. Counted in optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from sparsekern.errors import InputError
from sparsekern.topology.arguments import check_number, check_whole

ANNEALS = ("cosine", "constant")


@dataclass(frozen=True)
class Schedule:
    """Every ``update_every`` steps, from ``start`` to before ``stop``, a ``drop_fraction`` of a layer's blocks moves.

    Args:
        update_every: steps between updates, 1 or more.
        start: first step at which an update may happen.
        stop: no update happens at this step or later; None for no end.
        drop_fraction: a number in [0, 1], or a function of the step.
        anneal: what becomes of a number. ``"cosine"``: it falls to 0 along half a cosine from ``start`` to ``stop``
            (RigL, equation in section 3 of Evci et al. 2020, where ``start`` is 0); without ``stop`` it stays.
            ``"constant"``: it stays.
        offset: steps that are not counted: all of the above, the function's apart, is so much later. At 1 an update
            follows the first step, for those who count steps from 0.

    Raises:
        TypeError: not a number, or one that is not whole where it must be.
        ValueError: a number out of range, or an unknown ``anneal``.
    """

    update_every: int
    start: int
    stop: int | None
    drop_fraction: float | Callable[[int], float]
    anneal: str = "cosine"
    offset: int = 0

    def __post_init__(self) -> None:
        for name in ("update_every", "start", "offset"):
            check_whole(name, getattr(self, name))
        if self.anneal not in ANNEALS:
            raise InputError(f"anneal is {self.anneal!r}; it must be one of {', '.join(ANNEALS)}", parameter="anneal")
        if self.offset < 0:
            raise InputError(f"offset is {self.offset}; it must be 0 or more optimizer steps", parameter="offset")
        if self.update_every < 1:
            raise InputError(
                f"update_every is {self.update_every}; it must be 1 or more optimizer steps", parameter="update_every"
            )
        if self.start < 0:
            raise InputError(f"start is {self.start}; it must be 0 or more optimizer steps", parameter="start")
        if self.stop is not None and self.stop < self.start:
            raise InputError(
                f"stop is {self.stop}, before start = {self.start}; it must be that or later", parameter="stop"
            )
        if not callable(self.drop_fraction):
            _check_fraction(self.drop_fraction)

    def due(self, step: int) -> bool:
        """Return whether an update happens after optimizer step ``step`` (the first step is 1)."""
        counted = step - self.offset
        return step >= 1 and counted >= self.start and self.before_stop(step) and counted % self.update_every == 0

    def due_since(self, seen: int, step: int) -> bool:
        """Return whether an update became due after step ``seen`` and may still happen at step ``step``."""
        return self.before_stop(step) and any(self.due(s) for s in range(seen + 1, step + 1))

    def before_stop(self, step: int) -> bool:
        """Return whether updates may still happen after optimizer step ``step``."""
        return self.stop is None or step - self.offset < self.stop

    def fraction(self, step: int) -> float:
        """Return the fraction of blocks to move after optimizer step ``step``."""
        if callable(self.drop_fraction):
            return _check_fraction(self.drop_fraction(step))
        return self.drop_fraction * (1.0 if self.anneal == "constant" else self.cosine(step))

    def cosine(self, step: int) -> float:
        """Return what falls from 1 at ``start`` to 0 at ``stop``, as half a cosine; 1 before, and without a stop."""
        if self.stop is None:
            return 1.0
        if not self.before_stop(step):
            return 0.0
        counted = max(0, step - self.offset - self.start)
        return (1 + math.cos(math.pi * counted / (self.stop - self.start))) / 2


def whole_stop(stop: float | None) -> int | None:
    """Return the step, rounded down, of a ``stop`` that may be a product such as ``0.75 * steps``.

    Raises:
        TypeError: not a number.
        ValueError: not a finite one.
    """
    if stop is None:
        return None
    rule = "a number of optimizer steps, or None for no end"
    check_number("stop", stop, rule)
    if not math.isfinite(stop):
        raise InputError(f"stop is {stop}; it must be {rule}", parameter="stop")
    return int(stop)


def _check_fraction(fraction: float) -> float:
    check_number("drop_fraction", fraction, "a number in [0, 1], or a function of the step")
    if not 0 <= fraction <= 1:
        raise InputError(f"drop_fraction is {fraction}; it must be in [0, 1]", parameter="drop_fraction")
    return fraction
