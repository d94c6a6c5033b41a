"""The tables of a run and of a comparison on a terminal, and the notes below them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.box import HEAVY_HEAD, SIMPLE_HEAD, Box
from rich.table import Table

from sparsekern.lab.report.tables import Cells, comparison_cells, comparison_title, result_cells, result_title


def result_table(results: dict[str, Any]) -> Table:
    """Return the table of ``results.json``."""
    return _table(result_title(results), result_cells(results), len(results["networks"]), HEAVY_HEAD)


def comparison_table(content: dict[str, Any]) -> Table:
    """Return the table of ``comparison.json``."""
    cells = comparison_cells(content["rows"])
    return _table(comparison_title(content), cells, len(cells[0]), SIMPLE_HEAD)


def _table(title: str, cells: Cells, numbers: int, box: Box) -> Table:
    """Return a table of which that many columns, after the first, are aligned right."""
    table = Table(title=title, title_justify="left", box=box)
    heading, rows = cells
    for column, name in enumerate(heading):
        table.add_column(name, justify="right" if 0 < column <= numbers else "left")
    for row in rows:
        table.add_row(*row)
    return table


def aligned(notes: Sequence[tuple[str, str]]) -> str:
    """Return notes on a line each, behind their topics."""
    width = max(len(topic) for topic, _ in notes) + 2
    return "\n".join(f"{topic:<{width}}{text}" for topic, text in notes)
