"""Checkpoints: one folder each, complete or absent.

``checkpoints/seed-0/step-00000460/`` holds ``<network>.safetensors`` (the model, for anyone to load) and ``state.pt``
(what else a resumed run needs, and the checksums of the models). A folder is written under another name, synced to the
disk and renamed; then older ones are deleted, except the last few and the best.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsekern.errors import InputError
from sparsekern.files.atomic_files import make_folder, make_parents, refuse_link, remove_folder, remove_leftovers
from sparsekern.files.weight_files import read_torch, write_state
from sparsekern.lab.formats import FORMAT_VERSION, State, checked

logger = logging.getLogger("sparsekern")

DAMAGED = "damaged-"
"""How the name of a damaged checkpoint begins."""

STATE = "state.pt"

SECONDS = {"s": 1, "min": 60, "h": 3600}

INTERVAL = re.compile(r"([1-9][0-9]{0,8})(s|min|h)?")


@dataclass(frozen=True)
class Keeping:
    """When a run saves checkpoints, and how many of them stay.

    It changes no result, so a resumed run may be given another one. Beside the newest ``keep`` checkpoints of a seed
    the best one stays: that of the epoch in which the run's first network was best. It is for use; what is reported
    is the last epoch's.

    Attributes:
        save_every: ``"500"`` steps, or ``"90s"``, ``"10min"``, ``"2h"``. A run saves after every epoch anyway.
        keep: number of newest checkpoints, 1 or more. If the newest is damaged, a run goes on from the one before.

    Raises:
        ValueError: a value of another form.
    """

    save_every: str = "10min"
    keep: int = 2

    def __post_init__(self) -> None:
        if not (isinstance(self.save_every, str) and INTERVAL.fullmatch(self.save_every)):
            raise InputError(
                f"save_every is {self.save_every!r}; it must be a number of steps such as 500, or a time such as 90s, "
                "10min or 2h",
                parameter="save_every",
            )
        if type(self.keep) is not int or self.keep < 1:
            raise InputError(f"keep is {self.keep!r}; it must be a whole number of 1 or more", parameter="keep")

    @classmethod
    def from_json(cls, values: Any) -> Keeping:
        """Read the values of :func:`dataclasses.asdict`; raise ValueError if they are others."""
        if not isinstance(values, dict) or values.keys() != {"save_every", "keep"}:
            raise InputError("it must have the entries save_every and keep", parameter="keeping")
        return cls(**values)


DEFAULT = Keeping()


class Clock:
    """Tells when the next checkpoint is due.

    Args:
        keeping: the interval.
        steps: number of steps made when the clock is set.
    """

    def __init__(self, keeping: Keeping, steps: int) -> None:
        match = INTERVAL.fullmatch(keeping.save_every)
        assert match is not None  # Keeping checked it
        self._every, self._seconds = int(match[1]), SECONDS.get(match[2])
        self.set(steps)

    def set(self, steps: int) -> None:
        """Begin to count at this number of steps, and now."""
        self._steps, self._since = steps, time.monotonic()

    def due(self, steps: int) -> bool:
        """Return whether the interval has passed."""
        if self._seconds is None:
            return steps - self._steps >= self._every
        return time.monotonic() - self._since >= self._every * self._seconds


class OtherVersion(InputError):
    """A checkpoint is of another format version than this code reads."""


def seed_folder(run_folder: Path, seed: int) -> Path:
    """Return where the checkpoints of one seed are."""
    return run_folder / "checkpoints" / f"seed-{seed}"


def save(
    folder: Path,
    step: int,
    models: Mapping[str, Mapping[str, Tensor]],
    state: dict[str, Any],
    *,
    keep: int = 1,
    best: int | None = None,
) -> Path:
    """Write a checkpoint, then delete older ones; returns its folder.

    Args:
        folder: of the seed.
        step: grows from one checkpoint to the next. One that exists is left alone: training is deterministic, so a
            step has one state.
        models: state dicts by the name of the network.
        state: tensors and plain values only.
        keep: number of newest checkpoints that stay.
        best: step of one that stays beside them.

    Raises:
        ValueError: a symbolic link is in the place of the folder.
    """
    final = _folder(folder, step)
    _refuse_links(folder)
    if final.exists():
        return final
    make_parents(folder)

    def fill(unfinished: Path) -> None:
        for name, model in models.items():
            write_state(unfinished / f"{name}.safetensors", model)
        sums = {path.name: _checksum(path) for path in unfinished.iterdir()}
        torch.save({"version": FORMAT_VERSION, "sha256": sums, **state}, unfinished / STATE)

    make_folder(final, fill)
    tidy(folder, keep, best)
    return final


def latest(folder: Path) -> Path | None:
    """Return the newest checkpoint of a seed, or None."""
    found = _all(folder)
    return found[-1] if found else None


def tidy(folder: Path, keep: int = 1, best: int | None = None) -> None:
    """Delete what a killed run left unfinished, and all checkpoints but the newest ``keep`` and the ``best``.

    Raises:
        ValueError: a symbolic link is in the place of the folder.
    """
    _refuse_links(folder)
    remove_leftovers(folder)
    for path in _all(folder)[:-keep]:
        if best is None or path != _folder(folder, best):
            remove_folder(path)


def restore(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest checkpoint of a seed and its state; None if there is none.

    A damaged one is renamed, with a warning, if there is an older one to go on from. That makes no difference to the
    results.

    Raises:
        ValueError: all there are are damaged, or a symbolic link is in the place of the folder.
        OtherVersion: the newest is of another format version.
    """
    _refuse_links(folder)
    damaged: list[tuple[Path, InputError]] = []
    for path in reversed(_all(folder)):
        try:
            state = load_state(path)
        except OtherVersion:
            raise
        except InputError as error:
            damaged.append((path, error))
            continue
        for bad, why in damaged:
            logger.warning("%s; going on from %s", why, path.name)
            with suppress(FileNotFoundError):
                remove_folder(folder / (DAMAGED + bad.name))
            bad.rename(folder / (DAMAGED + bad.name))
        return path, state
    if damaged:
        raise InputError(f"{damaged[0][1]}; there is no older checkpoint: delete {folder} to train this seed anew")
    return None


def _refuse_links(folder: Path) -> None:
    """Raise ValueError if the folder of a seed, or that of all seeds, is a symbolic link."""
    for path in (folder.parent, folder):
        refuse_link(path)


def _folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _all(folder: Path) -> list[Path]:
    """Return the checkpoints of a seed, oldest first."""
    found = {path: path.name.removeprefix("step-") for path in folder.glob("step-*")}
    return sorted((path for path, step in found.items() if step.isdecimal()), key=lambda path: int(found[path]))


def load_state(checkpoint: Path) -> dict[str, Any]:
    """Return the state that was saved, on the CPU. Executes nothing that the file might contain.

    Raises:
        ValueError: a file is missing, or damaged anywhere in it.
        OtherVersion: the state is of another format version.
    """
    state = read_torch(checkpoint / STATE)
    version = state.get("version") if isinstance(state, dict) else None
    if type(version) is not int:
        raise InputError(f"{checkpoint / STATE} is not the state of a run")
    if version != FORMAT_VERSION:
        raise OtherVersion(
            f"{checkpoint / STATE} has format version {version}; this code reads {FORMAT_VERSION}: resume with the "
            "version of sparsekern that wrote it"
        )
    if not isinstance(sums := state.get("sha256"), dict):
        raise InputError(f"{checkpoint / STATE} has no checksums")
    for name, checksum in sums.items():
        path = checkpoint / Path(str(name)).name
        if not path.is_file() or _checksum(path) != checksum:
            raise InputError(f"{path} is {'damaged' if path.is_file() else 'missing'}")
    checked(State, state, checkpoint / STATE)
    result: dict[str, Any] = state
    return result


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()
