"""When a run writes checkpoints inside an epoch, and which of them stay."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sparsekern.errors import InputError

SECONDS = {"s": 1, "min": 60, "h": 3600}

FORM = re.compile(r"([1-9][0-9]{0,8})(s|min|h)?")


@dataclass(frozen=True)
class Keeping:
    """What of a run is saved when. It changes no result, so a resumed run may be given another one.

    Beside the newest ``keep`` checkpoints of a seed the best one stays: that of the epoch in which the run's first
    network had its highest test accuracy. It is for use; what is reported is the last epoch's.

    Attributes:
        save_every: ``"500"`` steps, or ``"90s"``, ``"10min"``, ``"2h"``. After every epoch a run saves anyway.
        keep: number of newest checkpoints, 1 or more. If the newest is damaged, a run goes on from the one before.

    Raises:
        ValueError: of another form.
    """

    save_every: str = "10min"
    keep: int = 2

    def __post_init__(self) -> None:
        if not (isinstance(self.save_every, str) and FORM.fullmatch(self.save_every)):
            raise InputError(
                f"save_every is {self.save_every!r}; it must be a number of steps such as 500, or a time such as 90s, "
                "10min or 2h",
                parameter="save_every",
            )
        if type(self.keep) is not int or self.keep < 1:
            raise InputError(f"keep is {self.keep!r}; it must be a whole number of 1 or more", parameter="keep")

    def to_json(self) -> dict[str, Any]:
        """Return plain values that :meth:`from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Keeping:
        """Read what :meth:`to_json` returned; names that are not there have their defaults.

        Raises:
            ValueError: a name too many, or a value of another form.
        """
        if unknown := sorted(values.keys() - {"save_every", "keep"}):
            raise InputError(
                f"keeping has entries that this version of sparsekern does not know: {unknown}", parameter="keeping"
            )
        return cls(**values)


class Clock:
    """Tells when the next checkpoint is due.

    Args:
        keeping: says how often.
        steps: those made when the clock is set.
    """

    def __init__(self, keeping: Keeping, steps: int) -> None:
        match = FORM.fullmatch(keeping.save_every)
        assert match is not None  # Keeping checked it
        self._every, self._seconds = int(match[1]), SECONDS.get(match[2])
        self.set(steps)

    def set(self, steps: int) -> None:
        """Count from now on."""
        self._steps, self._since = steps, time.monotonic()

    def due(self, steps: int) -> bool:
        """Return whether so many steps, or so much time, have gone by."""
        if self._seconds is None:
            return steps - self._steps >= self._every
        return time.monotonic() - self._since >= self._every * self._seconds


def best_step(rows: Sequence[Mapping[str, Any]], networks: Sequence[str]) -> int | None:
    """Return the number of the checkpoint after the first network's best epoch, or None if none is complete.

    Args:
        rows: of one seed.
        networks: in the order in which they are trained; a checkpoint is numbered by the steps of all together.
    """
    by_epoch: dict[int, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        by_epoch.setdefault(row["epoch"], {})[row["network"]] = row
    complete = [one for one in by_epoch.values() if all(name in one for name in networks)]
    if not complete:
        return None
    best = max(complete, key=lambda one: one[networks[0]]["test_accuracy"])  # of equal ones the first
    return sum(int(best[name]["step"]) for name in networks)
