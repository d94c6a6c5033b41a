"""The files of a run folder, but for the checkpoints: ``config.json``, ``metrics.jsonl``, ``results.json``."""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from sparsekern.errors import InputError
from sparsekern.files.atomic_files import append, is_private, make_parents, replace
from sparsekern.lab import checkpoint
from sparsekern.lab.config import FORMAT_VERSION, Config, upgraded
from sparsekern.lab.formats import ConfigFile, Results, Row, checked
from sparsekern.lab.lock import LOCK

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


@dataclass(frozen=True)
class Record:
    """A run as its folder has it.

    Attributes:
        folder: of the run.
        config: its options.
        data: what ``config.json`` says about the data.
        environment: where it was trained.
        rows: of ``metrics.jsonl``.
        results: of ``results.json``; None while the run is not finished.
        checkpoint: the newest one of the first seed, or None.
        history: the film of :class:`~sparsekern.lab.history.History` in it, or None.
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
    check_run("run", folder)
    config, data = read_config(folder)
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
            history = checkpoint.load_state(newest).get("history")
            if history is None and config.sparse:
                missing.append("The run was trained by a version that kept no block maps.")
        except ValueError as error:
            missing.append(f"Block maps: {error}.")
    environment = (results or read_json(folder / CONFIG)).get("environment", {})
    return Record(folder, config, data, environment, rows, results, newest, history, missing)


def _read_rows(path: Path, missing: list[str]) -> list[dict[str, Any]]:
    """Return the rows; a last line that a killed run did not finish is left out."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            checked(Row, row, f"{path}, line {number}", "remove the line, or resume the run")
        except (ValueError, RecursionError) as error:
            if number < len(lines):
                way_out = "remove the line, or resume the run"
                cause = str(error) if way_out in str(error) else f"{path}, line {number} is damaged; {way_out}"
                raise InputError(cause) from None
            missing.append(f"The last line of {path.name} was not written to its end.")
            break
        rows.append(row)
    if not rows:
        missing.append("No epoch is finished yet: there is nothing to plot.")
    return rows
