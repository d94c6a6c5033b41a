"""What a run folder tells, of a run that is finished or not; nothing is computed."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsekern.errors import InputError
from sparsekern.lab import checkpoint
from sparsekern.lab.config import Config
from sparsekern.lab.folder import CONFIG, METRICS, RESULTS, check_run, read_config, read_json, read_results
from sparsekern.lab.formats import Row, checked


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
