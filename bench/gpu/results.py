"""Where measurements are kept: one JSON line each, written as soon as it is known.

Whatever stops a part keeps what it had measured, and the next run continues after it. A line tells with what it was
measured (device, versions, commit, date), so that files can be put together and still be read.
A folder holds the results of one device, commit and version.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
Row = dict[str, Any]

WRITES = {
    "environment": ("environment.json",),
    "smoke": ("smoke.jsonl",),
    "tests": ("tests.jsonl",),
    "untuned": ("untuned/untuned.jsonl", "untuned.jsonl"),
    "micro": ("micro.jsonl",),
    "tune": ("tune.jsonl", "sm_*.json"),
    "race": ("race.jsonl",),
    "conv2d": ("conv2d.jsonl",),
    "counters": ("counters.json",),
    "sanitizer": ("sanitizer.json",),
}
"""The files of each part."""

SAME = ("device", "commit", "torch", "triton")
"""What all results of a folder have in common."""

TRIES = 2
"""How often a measurement may be begun and not come back (a hang, a crash) before it is given up."""


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file; none if there is no file, and without a line that was cut off when it was written."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def read_json(path: Path) -> Row | None:
    """Return a whole JSON file, or None if there is none that can be read."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def write_json(path: Path, content: Any) -> None:
    """Write a whole JSON file: it is there complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}.tmp")
    aside.write_text(json.dumps(content, indent=1) + "\n")
    aside.replace(path)


def circumstances(part: str, rehearsal: bool) -> Row:
    """Return what every row says beside its figure."""
    import torch  # here, because the plugin of the tests needs this file and not torch

    try:
        from importlib.metadata import version

        triton = version("triton")
    except ImportError:
        triton = "none"
    device = "cpu (Triton interpreter)" if rehearsal else torch.cuda.get_device_name()
    return {
        "part": part,
        "rehearsal": rehearsal,
        "device": device,
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def commit() -> str:
    """Return the commit of the checkout, with a mark if files differ from it.

    ``COMMIT`` in the environment comes first: a copy has no history, or lies in another checkout, whose it would be.
    """
    if given := os.environ.get("COMMIT"):
        return given

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "--short", "HEAD").strip() + (
            "+changes" if git("status", "--porcelain", "-uno") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def same_circumstances(row: Row, here: Row) -> bool:
    """Return whether a row, if it says at all, is of the same device, commit and versions."""
    return all(row.get(field, here[field]) == here[field] for field in SAME)


def other_results(folder: Path, here: Row) -> str | None:
    """Return in a sentence which results of a folder do not belong with those of ``here``, or None."""
    rows = {path: read_rows(path) for path in sorted(folder.rglob("*.jsonl"))}
    rows |= {path: [read_json(path) or {}] for path in (folder / "sanitizer.json", folder / "counters.json")}
    for path, found in rows.items():
        for row in found:
            if not same_circumstances(row, here):
                field = next(field for field in SAME if row.get(field, here[field]) != here[field])
                return (
                    f"{path} has results of {field} {row[field]}, and this is {here[field]}; "
                    "give another folder, or begin anew with --force"
                )
    return None


def delete(folder: Path, part: str) -> None:
    """Delete everything that a part writes."""
    for pattern in WRITES[part]:
        for path in folder.glob(pattern):
            path.unlink()


class Results:
    """The file of one part.

    Args:
        path: a ``.jsonl`` file; what is in it already counts as measured.
        common: added to every row.
    """

    def __init__(self, path: Path, common: Row) -> None:
        self.path, self.common = path, common
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = read_rows(path)
        self.begun = Counter(row["key"] for row in kept if row.get("begun"))
        self.rows = [row for row in kept if not row.get("begun") and not row.get("done")]
        torn = path.is_file() and not path.read_text().endswith("\n")
        self._file = path.open("a")
        if torn:
            self._file.write("\n")

    def add(self, *rows: Row) -> None:
        """Append rows, all of them at once."""
        full = [{**self.common, **row} for row in rows]
        self.rows += full
        self._write(full)

    def begin(self, key: str) -> None:
        """Note that something is being measured, so that one that hangs or crashes is not tried for ever."""
        self.begun[key] += 1
        self._write([{"key": key, "begun": True}])

    def has(self, key: str) -> bool:
        """Return whether a key needs no more measuring: it is measured, failed, or given up."""
        if any(row.get("key") == key for row in self.rows):
            return True
        if self.begun[key] >= TRIES:
            self.add({"key": key, "error": f"begun {self.begun[key]} times, and the process was stopped or died"})
            return True
        return False

    def finish(self) -> None:
        """Note that nothing is left to do."""
        self._write([{**self.common, "done": True}])

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, rows: list[Row]) -> None:
        self._file.write("".join(json.dumps(row) + "\n" for row in rows))
        self._file.flush()
