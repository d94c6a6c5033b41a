"""Schedules: at which optimizer steps blocks move, and what fraction of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from sparsekern.errors import InputError
from sparsekern.topology.arguments import check_choice, check_number, check_whole


@dataclass(frozen=True)
class Schedule:
    """The steps at which a topology is updated, and the fraction of each layer's blocks that moves.

    Args:
        update_every: optimizer steps between updates, 1 or more.
        start: the first step at which an update may happen.
        stop: the step from which on no update happens; None for no end.
        drop_fraction: a number in [0, 1], or a function of the step.
        anneal: how a number changes. ``"cosine"``: it falls to 0 along half a cosine from ``start`` to ``stop``, as in
            RigL (Evci et al. 2020, section 3, where ``start`` is 0), and is constant without ``stop``. ``"constant"``:
            it does not change. ``"steps"``: it is halved after three quarters of the way from ``start`` to ``stop``, as
            in MEST (Yuan et al. 2021).
        offset: the number of steps by which all of this is delayed; the argument of a function is not. With 1, an
            update follows the first step, as in code that counts steps from 0.

    Raises:
        TypeError: an argument is not a number, or not a whole one where it must be.
        ValueError: a number is out of range, ``anneal`` is unknown, or it is given with a function.
    """

    update_every: int
    start: int
    stop: int | None
    drop_fraction: float | Callable[[int], float]
    anneal: str = "cosine"
    offset: int = 0

    def __post_init__(self) -> None:
        check_choice("anneal", self.anneal, ("cosine", "constant", "steps"))
        for name, least in (("offset", 0), ("update_every", 1), ("start", 0)):
            check_whole(name, getattr(self, name), least, " optimizer steps")
        if self.stop is not None and self.stop < self.start:
            raise InputError(
                f"stop is {self.stop}, before start = {self.start}; it must be that or later", parameter="stop"
            )
        if not callable(self.drop_fraction):
            _check_fraction(self.drop_fraction)
        elif self.anneal != "cosine":
            raise InputError(
                f"anneal is {self.anneal!r}, which has no effect where drop_fraction is a function of the step; leave "
                "it out",
                parameter="anneal",
            )

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

    def is_last(self, step: int) -> bool:
        """Return whether no update is due after optimizer step ``step``."""
        return not self.before_stop(((step - self.offset) // self.update_every + 1) * self.update_every + self.offset)

    def progress(self, step: int) -> float:
        """Return the part of the way from ``start`` to the last update that step ``step`` has come, in [0, 1].

        Raises:
            ValueError: there is no ``stop``, or no update before it.
        """
        last = None if self.stop is None else (self.stop - 1) // self.update_every * self.update_every
        if last is None or not self.due(last + self.offset):
            raise InputError(
                f"stop is {self.stop}; it must be a step after which the final sparsity stays, with an update between "
                f"start = {self.start} and it (update_every = {self.update_every})",
                parameter="stop",
            )
        if last == self.start:
            return 1.0
        return min(1.0, max(0.0, (step - self.offset - self.start) / (last - self.start)))

    def fraction(self, step: int) -> float:
        """Return the fraction of blocks to move after optimizer step ``step``."""
        if callable(self.drop_fraction):
            return _check_fraction(self.drop_fraction(step))
        if self.anneal == "steps" and self.stop is not None:
            late = 4 * (step - self.offset - self.start) >= 3 * (self.stop - self.start)
            return self.drop_fraction * (0.5 if late else 1.0)
        return self.drop_fraction * (self.cosine(step) if self.anneal == "cosine" else 1.0)

    def cosine(self, step: int) -> float:
        """Return the half cosine that falls from 1 at ``start`` to 0 at ``stop``; 1 before, and without ``stop``."""
        if self.stop is None:
            return 1.0
        if not self.before_stop(step):
            return 0.0
        counted = max(0, step - self.offset - self.start)
        return (1 + math.cos(math.pi * counted / (self.stop - self.start))) / 2


def whole_stop(stop: float | None) -> int | None:
    """Return ``stop`` rounded down to a whole step: it may be a product such as ``0.75 * steps``.

    Raises:
        TypeError: it is not a number.
        ValueError: it is not finite.
    """
    if stop is None:
        return None
    check_number("stop", stop, "a number of optimizer steps, or None for no end", math.isfinite)
    return int(stop)


def _check_fraction(fraction: float) -> float:
    rule = "in [0, 1]: a number, or a function of the step"
    check_number("drop_fraction", fraction, rule, lambda part: 0 <= part <= 1)
    return fraction
