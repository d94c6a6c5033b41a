"""Checkpoints: one folder each, complete or not there at all.

``checkpoints/seed-0/step-00000460/`` holds ``<network>.safetensors`` (the model, for anyone to load) and ``state.pt``
(what a resumed run needs beside it). A folder is written aside, synced to the disk and renamed; then older ones go.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

ASIDE = ".unfinished"
STATE = "state.pt"
STATE_VERSION = 1


def seed_folder(run_folder: Path, seed: int) -> Path:
    """Return where the checkpoints of one seed are."""
    return run_folder / "checkpoints" / f"seed-{seed}"


def save(folder: Path, step: int, models: Mapping[str, nn.Module], state: dict[str, Any]) -> Path:
    """Write a checkpoint, then delete the older ones; returns its folder.

    Args:
        folder: of the seed.
        step: grows from one checkpoint to the next. One that exists is left alone: training is deterministic, so a
            step has one state.
        models: by the name of the network.
        state: tensors and plain values only.
    """
    from safetensors.torch import save_file

    aside, final = folder / ASIDE, folder / f"step-{step:08d}"
    if final.exists():
        return final
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    for name, model in models.items():
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()}
        save_file(tensors, aside / f"{name}.safetensors", metadata={"format": "pt"})
    torch.save({"version": STATE_VERSION, **state}, aside / STATE)
    for path in (*aside.iterdir(), aside):
        _sync(path)
    aside.rename(final)
    _sync(folder)
    tidy(folder)
    return final


def latest(folder: Path) -> Path | None:
    """Return the newest checkpoint of a seed, or None."""
    found = _all(folder)
    return found[-1] if found else None


def tidy(folder: Path) -> None:
    """Delete what a killed run left: an unfinished checkpoint, and all but the newest finished one."""
    shutil.rmtree(folder / ASIDE, ignore_errors=True)
    for path in _all(folder)[:-1]:
        shutil.rmtree(path)


def _all(folder: Path) -> list[Path]:
    """Return the checkpoints of a seed, oldest first."""
    return sorted(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def load_state(checkpoint: Path) -> dict[str, Any]:
    """Return the state that was saved, on the CPU. Executes nothing that the file might contain.

    Raises:
        ValueError: the file is missing, not readable, or of another version. (Damage inside a tensor is not seen.)
    """
    try:
        state: dict[str, Any] = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged file makes torch's reader raise is any exception at all
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{checkpoint / STATE} cannot be read: {reason}; start a new run") from None
    if state.get("version") != STATE_VERSION:
        raise ValueError(
            f"{checkpoint / STATE} has version {state.get('version')}; this code reads {STATE_VERSION}: resume "
            "with the version of sparsekern that wrote it"
        )
    return state


def load_model(checkpoint: Path, name: str, model: nn.Module) -> None:
    """Load the weights of one network into a model of the same shape.

    Raises:
        ValueError: the file is missing or damaged, or does not fit the model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = checkpoint / f"{name}.safetensors"
    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be loaded: {' '.join(str(error).split())}; start a new run") from None


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder, and needs no sync of one
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
