"""Files of a run folder, but for the checkpoints: ``config.json``, ``metrics.jsonl``, ``results.json``."""

from __future__ import annotations

import json
import os
import platform
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, InstanceOf

from sparsekern.errors import InputError
from sparsekern.files.atomic_files import (
    NO_FOLLOW,
    WITHOUT_LOCKS,
    append,
    is_private,
    make_parents,
    refuse_link,
    replace,
)
from sparsekern.lab import checkpoint
from sparsekern.lab.checkpoint import DEFAULT, Keeping
from sparsekern.lab.config import Config
from sparsekern.lab.formats import FORMAT_VERSION, Data, Part, Results, Row, checked
from sparsekern.lab.papers import deviations

CONFIG, METRICS, RESULTS = "config.json", "metrics.jsonl", "results.json"
PICTURE, SPECTRAL = "summary.png", "spectral.png"

PLAN = "plan.json"
"""File of the folder of a comparison, whose runs are folders in it."""

DECIDED = ("epochs", "update_every", "augment", "device")
"""Options that a run has decided, even if they were open at its start."""


def _decided(values: Any) -> Config:
    """Return the configuration of a run that has begun."""
    if not isinstance(values, dict):
        raise InputError("input should be a valid dictionary")
    config = Config.from_json(values)
    if open_ := [name for name in DECIDED if getattr(config, name) is None]:
        raise InputError(f"{' and '.join(open_)} must not be null")
    return config


Decided = Annotated[InstanceOf[Config], BeforeValidator(_decided)]


class ConfigFile(Part):
    """``config.json``."""

    config: Decided
    data: Data
    environment: dict[str, Any]
    keeping: Annotated[InstanceOf[Keeping], BeforeValidator(Keeping.from_json)]


class ResultsFile(Results):
    """``results.json``."""

    config: Decided


def default_folder(config: Config, now: datetime) -> Path:
    """Return ``runs/<date-time>-<method>-<sparsity>``, with the recipe before the method if it is not the default."""
    recipe = "" if config.recipe == Config.recipe else f"{config.recipe}-"
    return Path("runs") / f"{now:%Y%m%d-%H%M%S}-{recipe}{config.method}-{config.sparsity_slug}"


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
    content: dict[str, Any] = {
        "config": config.to_json(),
        "data": data,
        "environment": environment,
        "keeping": asdict(keeping),
    }
    if config.paper is not None:
        content["deviations"] = deviations(config, data)
    write_json(folder / CONFIG, content)


def is_new(folder: Path) -> bool:
    """Return whether a folder holds nothing but a lock, and what writers that were killed leave."""
    return folder.is_dir() and all(path.name == LOCK or is_private(path.name) for path in folder.iterdir())


def read_config(folder: Path, name: str = "resume") -> ConfigFile:
    """Read the ``config.json`` of a run.

    Args:
        folder: of the run.
        name: of the argument that names the folder, for the error.

    Raises:
        ValueError: there is no run in the folder, or its configuration is damaged or of another version.
    """
    check_run(name, folder)
    path = folder / CONFIG
    way_out = "use the version of sparsekern that wrote it, or start a new run"
    return checked(ConfigFile, read_json(path), path, way_out)


def read_results(folder: Path) -> dict[str, Any]:
    """Return the results of a finished run.

    Raises:
        ValueError: they are damaged, or of another format version.
    """
    content = read_json(folder / RESULTS)
    way_out = "delete it and resume the run, whose checkpoints make it anew"
    checked(ResultsFile, content, folder / RESULTS, way_out)
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


def write_json(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Write a JSON file atomically; return its content, which is the given one with a format version."""
    whole = {"format_version": FORMAT_VERSION, **content}
    write_text(path, json.dumps(whole, indent=2, allow_nan=False) + "\n")
    return whole


def read_json(path: Path) -> dict[str, Any]:
    """Read a file of :func:`write_json`.

    Raises:
        ValueError: the file is missing, not JSON, or of another format version.
    """
    try:
        content = json.loads(path.read_text())
        version = content["format_version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{path} is missing or damaged; start a new run") from None
    if version != FORMAT_VERSION or type(version) is not int:
        raise InputError(
            f"{path} has format version {version!r}; this code reads {FORMAT_VERSION}: use the version of sparsekern "
            "that wrote it, or start a new run"
        )
    result: dict[str, Any] = content
    return result


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write ``metrics.jsonl`` anew: a row for every network and epoch, in the order of training."""
    write_text(path, "".join(_line(row) for row in rows))


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add a row at the end of ``metrics.jsonl``."""
    append(path, _line(row))


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    replace(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


@dataclass(frozen=True)
class Record:
    """A run as its folder has it, finished or not.

    Attributes:
        folder: of the run.
        config: its options.
        data: description of the data.
        environment: versions and hardware of the training.
        rows: of ``metrics.jsonl``.
        results: of ``results.json``; None while the run is not finished.
        checkpoint: the newest one of the first seed, or None.
        history: its :class:`~sparsekern.lab.history.History`, or None.
        missing: what the folder lacks, a sentence each.
    """

    folder: Path
    config: Config
    data: dict[str, Any]
    environment: dict[str, Any]
    rows: list[dict[str, Any]]
    results: dict[str, Any] | None
    checkpoint: Path | None
    history: dict[str, Any] | None
    missing: list[str] = field(default_factory=list)

    @property
    def compared(self) -> list[dict[str, Any]]:
        """The rows of those epochs that every network has finished."""
        done = set.intersection(
            *(
                {(row["seed"], row["epoch"]) for row in self.rows if row["network"] == name}
                for name in self.config.networks
            )
        )
        return [row for row in self.rows if (row["seed"], row["epoch"]) in done]


def read_record(folder: Path) -> Record:
    """Read a run folder; what can be done without is noted as missing.

    Raises:
        ValueError: there is no run in the folder, or its ``config.json``, metrics or results are damaged.
    """
    file = read_config(folder, "run")
    results = read_results(folder) if (folder / RESULTS).is_file() else None
    missing: list[str] = []
    rows = _read_rows(folder / METRICS, missing)
    if results is None:
        missing.append(f"The run is not finished: sparsekern train --resume {folder} goes on with it.")
    newest = checkpoint.latest(checkpoint.seed_folder(folder, 0))
    history = None
    if newest is None:
        missing.append("There is no checkpoint yet: block maps and the layers' sizes and times come from one.")
    else:
        try:
            history = checkpoint.load_state(newest)["history"]
        except InputError as error:
            missing.append(f"Block maps: {error}.")
    environment = file.environment if results is None else results["environment"]
    return Record(folder, file.config, file.data.model_dump(), environment, rows, results, newest, history, missing)


def _read_rows(path: Path, missing: list[str]) -> list[dict[str, Any]]:
    """Return the rows; a last line that a killed run did not finish is left out."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    way_out = "remove the line, or resume the run"
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        try:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                raise InputError(f"{where} is damaged; {way_out}") from None
            checked(Row, row, where, way_out)
        except InputError:
            if number < len(lines):
                raise
            missing.append(f"The last line of {path.name} was not written to its end.")
            break
        rows.append(row)
    if not rows:
        missing.append("No epoch is finished yet: there is nothing to plot.")
    return rows


LOCK = ".lock"
"""Name of the lock file. One that a killed process left behind locks nothing."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is made if it does not exist. On disks without locks, nothing is locked.

    Raises:
        ValueError: another process holds it, the folder cannot be written, or the lock file is a symbolic link.
    """
    from filelock import FileLock, Timeout

    path = folder / LOCK
    owner, lock = _owner(path), FileLock(path, timeout=0.1, poll_interval=0.01)
    try:
        refuse_link(path)
        make_parents(folder)
        lock.acquire()
        _note_owner(path)
    except Timeout:
        raise InputError(
            f"the folder {folder} is in use by another process{owner}; wait for it, or stop it first"
        ) from None
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise InputError(f"the folder {folder} cannot be written ({error.strerror}); choose another one") from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: another process that waits for this file sees that it is gone
        lock.release()


def _note_owner(path: Path) -> None:
    """Write process and machine, as filelock itself does on disks where the file stands for the lock."""
    mine = f"{os.getpid()}\n{platform.node()}"
    handle = os.open(path, os.O_RDWR | NO_FOLLOW)
    with open(handle, "r+", encoding="utf-8", errors="replace") as file:
        if file.read(len(mine)) != mine:
            file.seek(0)
            file.write(mine)
            file.truncate()


def _owner(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            text = " on ".join(file.read(100).split("\n")[:2])
    except OSError:
        return ""
    return f" ({text})" if text else ""
