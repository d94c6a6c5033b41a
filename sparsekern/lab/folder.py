"""The files of a run folder, but for the checkpoints: ``config.json``, ``metrics.jsonl``, ``results.json``."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from sparsekern.errors import InputError
from sparsekern.files.atomic_files import append, is_private, make_parents, replace
from sparsekern.lab.config import FORMAT_VERSION, Config, upgraded
from sparsekern.lab.formats import ConfigFile, Results, checked
from sparsekern.lab.keeping import Keeping
from sparsekern.lab.lock import LOCK

DEFAULT = Keeping()

CONFIG, METRICS, RESULTS, PICTURE = "config.json", "metrics.jsonl", "results.json", "summary.png"
SPECTRAL = "spectral.png"

RESOLVED = ("epochs", "update_every", "augment", "device")
"""Options that a run has decided, whatever was left open at its start."""

PLAN = "plan.json"
"""What the folder of a comparison has, whose runs are folders in it."""


def default_folder(config: Config, now: datetime) -> Path:
    """Return ``runs/<date-time>-<method>-<sparsity>``, with the recipe before the method if it is not the default."""
    recipe = "" if config.recipe == Config.recipe else f"{config.recipe}-"
    return Path("runs") / f"{now:%Y%m%d-%H%M%S}-{recipe}{config.method}-{config.sparsity:g}"


def create(
    folder: Path,
    config: Config,
    data: dict[str, Any],
    environment: dict[str, Any],
    keeping: Keeping = DEFAULT,
) -> None:
    """Make a run folder and write its ``config.json``.

    Raises:
        ValueError: there is something in the folder, or it cannot be made.
    """
    try:
        if folder.is_dir() and not is_new(folder):
            way_out = "resume it with --resume, or " if (folder / CONFIG).is_file() else ""
            raise InputError(f"out is {folder}, which is not empty; {way_out}choose another --out", parameter="out")
        make_parents(folder)
    except OSError as error:
        raise InputError(
            f"out is {folder}, which cannot be made ({error.strerror}); choose another --out", parameter="out"
        ) from None
    content = {"config": config.to_json(), "data": data, "environment": environment, "keeping": keeping.to_json()}
    write_json(folder / CONFIG, content)


def is_new(folder: Path) -> bool:
    """Return whether a folder holds nothing but a lock, and what writers that were killed leave."""
    return folder.is_dir() and all(path.name == LOCK or is_private(path.name) for path in folder.iterdir())


def read_config(folder: Path) -> tuple[Config, dict[str, Any]]:
    """Return the configuration of a run and the description of its data.

    Raises:
        ValueError: there is no run in the folder, or its configuration is damaged.
    """
    check_run("resume", folder)
    content = read_json(folder / CONFIG)
    checked(ConfigFile, content, folder / CONFIG, "start a new run")
    try:
        config = Config.from_json(content["config"])
        if open_ := [name for name in RESOLVED if getattr(config, name) is None]:
            raise InputError(f"{' and '.join(open_)} must not be null")
    except ValueError as error:
        raise InputError(
            f"{folder / CONFIG} cannot be used: {error}; use the version that wrote it, or start a new run"
        ) from None
    return config, content["data"]


def read_results(folder: Path) -> dict[str, Any]:
    """Return the results of a finished run.

    Raises:
        ValueError: they are damaged, or of a newer format version.
    """
    content = read_json(folder / RESULTS)
    way_out = "delete it and resume the run, whose checkpoints make it anew"
    checked(Results, content, folder / RESULTS, way_out)
    try:
        Config.from_json(content["config"])
    except ValueError as error:
        raise InputError(f"{folder / RESULTS} is damaged: config: {error}; {way_out}") from None
    return content


def check_run(name: str, folder: Path, wanted: str = "the folder of a run") -> None:
    """Check that a folder is that of a run.

    Args:
        name: of the argument that names the folder.
        folder: to check.
        wanted: what may be given.

    Raises:
        ValueError: it is not; the text says what it is, and what to give.
    """
    if (folder / CONFIG).is_file():
        return
    if (folder / PLAN).is_file():
        runs = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
        such = f", such as {runs[0]}" if runs else ""
        raise InputError(
            f"{name} is {folder}, which is a comparison; give one of the runs in it{such}. All of them go on by: "
            f"sparsekern compare --out {shlex.quote(str(folder))}",
            parameter=name,
        )
    raise InputError(f"{name} is {folder}, which has no {CONFIG}; give {wanted}", parameter=name)


def read_keeping(folder: Path) -> Keeping:
    """Return what a run keeps; of an older one, which does not say it, the default.

    Raises:
        ValueError: the configuration is damaged.
    """
    try:
        return Keeping.from_json(read_json(folder / CONFIG).get("keeping", {}))
    except (TypeError, AttributeError):
        raise InputError(f"{folder / CONFIG} is not the configuration of a run; start a new run") from None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file with a format version, whole or not at all."""
    text = json.dumps({"format_version": FORMAT_VERSION, **content}, indent=2, allow_nan=False)
    write_text(path, text + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read what :func:`write_json` wrote, now or when the format was an older one.

    Raises:
        ValueError: not JSON, or of a newer format version.
    """
    try:
        content = json.loads(path.read_text())
        version = content["format_version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{path} is missing or damaged; start a new run") from None
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise InputError(
            f"{path} has format version {version}; this code reads 1 to {FORMAT_VERSION}: use the version of "
            "sparsekern that wrote it"
        )
    result: dict[str, Any] = content
    if isinstance(result.get("config"), dict):
        result["config"] = upgraded(result["config"], version)
    return result


class Metrics:
    """``metrics.jsonl``: a row for every network and epoch, in the order of training.

    Args:
        path: the file, which is replaced.
        rows: those of the checkpoints of the run, so that a resumed run has no row twice.
    """

    def __init__(self, path: Path, rows: Sequence[dict[str, Any]]) -> None:
        self.path = path
        write_text(path, "".join(_line(row) for row in rows))

    def append(self, row: dict[str, Any]) -> None:
        """Add a row at the end."""
        append(self.path, _line(row))


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write a text, whole or not at all."""
    replace(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))
