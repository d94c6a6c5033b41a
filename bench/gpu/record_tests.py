"""A pytest plugin: writes one JSON line per test as soon as it has run, and leaves out what has passed before.

A report that is written at the end is lost when the time is over. The file is named by ``RECORD_TESTS``;
``RECORD_TESTS_WITH`` is what every row says (device, versions, commit): what passed elsewhere has not passed here.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from bench.gpu.results import Row, read_rows, same_circumstances

FILE, WITH = "RECORD_TESTS", "RECORD_TESTS_WITH"
_seconds: dict[str, float] = {}
_is_worker = False  # the environment does not say: a process that a worker starts inherits it


def pytest_configure(config: pytest.Config) -> None:
    """Find out whether this process is a worker of pytest-xdist."""
    global _is_worker
    _is_worker = hasattr(config, "workerinput")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that have passed, in every worker alike."""
    here = _circumstances()
    rows = [row for row in read_rows(Path(os.environ[FILE])) if not here or same_circumstances(row, here)]
    passed = {row["key"] for row in rows if row.get("outcome") == "passed"}
    again = [item for item in items if item.nodeid not in passed]
    if len(again) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in passed])
        items[:] = again


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write the row of a test that is over; with several workers only the process that collects reports writes."""
    if _is_worker:
        return
    _seconds[report.nodeid] = _seconds.get(report.nodeid, 0.0) + report.duration
    # A test is one call; what fails or is skipped before or after it has no passing call to report.
    if report.when == "call" or not report.passed:
        row = {"key": report.nodeid, "outcome": report.outcome, "seconds": round(_seconds[report.nodeid], 3)}
        if report.outcome == "failed":
            row["error"] = str(report.longrepr)[-2000:]
        if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
            row["reason"] = str(report.longrepr[2])[:200]
        with open(os.environ[FILE], "a") as file:
            file.write(json.dumps(_circumstances() | row) + "\n")


def _circumstances() -> Row:
    found: Row = json.loads(os.environ.get(WITH, "{}"))
    return found
