"""What the commands that read a checkpoint are given: a file of weights, a checkpoint folder, or a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsekern.errors import InputError
from sparsekern.lab import checkpoint
from sparsekern.lab.folder import CONFIG, check_run

MaxGib = Annotated[
    float,
    typer.Option(help="GiB that the file may ask for; one of more than a sixteenth of that, 16 times its own size."),
]
MaxTensors = Annotated[int, typer.Option(help="Tensors that the file may hold.")]

WAYS = "a file of weights, a checkpoint folder or a run folder"


def weights_file(path: Path, network: str, seed: int) -> Path:
    """Return the file of weights that a path stands for: of a run the newest checkpoint's.

    Raises:
        ValueError: there is none.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist; give {WAYS}")
    if path.is_file():
        return path
    folder: Path | None = path
    if (path / CONFIG).is_file():
        folder = checkpoint.latest(checkpoint.seed_folder(path, seed))
        if folder is None:
            seeds = ", ".join(str(number) for number in saved_seeds(path)) or "none"
            raise InputError(
                f"seed is {seed}, which has no checkpoint in {path}; those that have one: {seeds}", parameter="seed"
            )
    elif not any(path.glob("*.safetensors")):
        check_run("the source", path, WAYS)
    assert folder is not None
    file = folder / f"{network}.safetensors"
    if not file.is_file():
        there = ", ".join(sorted(found.stem for found in folder.glob("*.safetensors"))) or "none"
        raise InputError(
            f"network is {network!r}, of which {folder} has no weights; it has those of: {there}", parameter="network"
        )
    return file


def saved_seeds(run: Path) -> list[int]:
    """Return the seeds of a run that have a checkpoint."""
    names = (found.name.removeprefix("seed-") for found in (run / "checkpoints").glob("seed-*"))
    seeds = sorted(int(name) for name in names if name.isdecimal())
    return [seed for seed in seeds if checkpoint.latest(checkpoint.seed_folder(run, seed)) is not None]
