"""Checkpoints: one folder each, complete or absent.

``checkpoints/seed-0/step-00000460/`` holds ``<network>.safetensors`` (the model, for anyone to load) and ``state.pt``
(what else a resumed run needs, and the checksums of the models). A folder is written under another name, synced to the
disk and renamed; then older ones are deleted, except the last few and the best.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.errors import InputError
from sparsekern.files import load_
from sparsekern.files.atomic_files import make_folder, make_parents, refuse_link, remove_folder, remove_leftovers
from sparsekern.files.torch_files import read_torch
from sparsekern.files.weight_files import write_state
from sparsekern.lab.checkpoint_formats import State
from sparsekern.lab.formats import FORMAT_VERSION, checked

logger = logging.getLogger("sparsekern")

DAMAGED = "damaged-"
"""How the name of a damaged checkpoint begins."""

STATE = "state.pt"


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


def load_model(checkpoint: Path, name: str, model: nn.Module) -> None:
    """Load the weights of one network into a model of the same shape.

    Raises:
        ValueError: the file is missing or damaged, or does not fit the model.
    """
    load_(model, checkpoint / f"{name}.safetensors")


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()
