"""The tables of a run and of a comparison on a terminal, and the notes below them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from sparsekern.lab.config import Config
from sparsekern.lab.report.tables import comparison_cells, result_cells, result_title


def result_table(results: dict[str, Any]) -> Table:
    """Return the table of ``results.json``."""
    heading, rows = result_cells(results)
    table = Table(title=result_title(results), title_justify="left")
    for number, name in enumerate(heading):
        table.add_column(name, justify="right" if 0 < number <= len(results["networks"]) else "left")
    for row in rows:
        table.add_row(*row)
    return table


def comparison_table(content: dict[str, Any]) -> Table:
    """Return the table of ``comparison.json``."""
    base = Config.from_json(content["plan"]["base"])
    heading, rows = comparison_cells(content["rows"])
    table = Table(title=f"{content['data']['name']}, {base.network_title}", title_justify="left", box=SIMPLE_HEAD)
    for number, name in enumerate(heading):
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    return table


def aligned(notes: Sequence[tuple[str, str]]) -> str:
    """Return notes on a line each, behind their topics."""
    width = max(len(topic) for topic, _ in notes) + 2
    return "\n".join(f"{topic:<{width}}{text}" for topic, text in notes)
