"""``sparsekern bench``: whether sparse layers are faster than dense ones, on this machine, for the user's layer."""

from __future__ import annotations

import json
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from rich.text import Text

import sparsekern
from sparsekern.cli.info import device_name
from sparsekern.cli.options import Json, Quiet, annotation, takes
from sparsekern.cli.shell import PlainConsole, check_file, error_console, explained, progress, say
from sparsekern.errors import InputError
from sparsekern.lab.bench.request import Request, read_request
from sparsekern.lab.bench.results import (
    MOST,
    SLOWER,
    break_evens,
    draw_bench,
    group_title,
    groups,
    model_cells,
    table_cells,
)
from sparsekern.lab.bench.run import Report, run_bench
from sparsekern.lab.options import declared
from sparsekern.lab.report.tables import Cells, count

WIDTH = 140
"""Columns of the tables where there is no terminal."""

PICTURES = (".png", ".svg", ".pdf")

RACE = {entry.name: annotation(entry) for entry in declared(read_request)}
"""The options that say what is raced, by name, as typer takes them."""


@takes(values=RACE)
def bench(
    *,
    values: dict[str, Any],
    picture: Annotated[
        Path | None, typer.Option(help=f"Draw the speed-up over sparsity: a file, {', '.join(PICTURES)}.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Race sparse layers against the dense layer that they replace, on this machine.

    Dense and sparse layers take turns in one process, forward and forward + backward, through autograd as in a
    training. Answers are checked against dense products in float64 first. The tables show medians and quartiles, how
    many times as fast as dense each block size is, and from which sparsity on.

    Examples:

    sparsekern bench --linear 768x3072 --tokens 4096 --sparsity 0.8,0.9 --threads 1,2

    sparsekern bench --conv 64x128x3 --image 32x56x56 --picture conv.png

    sparsekern bench --model resnet18-cifar --sparsity 0.9

    sparsekern bench --model torchvision.models:resnet18 --input 8x3x224x224
    """
    errors = error_console()
    with explained(errors, lambda saved: "stopped; nothing is printed before the last race", bench):
        request = read_request(**values)
        if picture is not None:
            if picture.suffix not in PICTURES:
                raise InputError(
                    f"picture is {picture}; the name must end in {', '.join(PICTURES)}", parameter="picture"
                )
            check_file(picture, "picture")
        report = _raced(request, errors, quiet)
        place = _place(request)
        drawn = place if report.busy is None else f"{place}; the machine was too busy to believe it"
        if picture is not None and (left := draw_bench(picture, report.rows, drawn)):
            report.note(f"the picture shows the first {MOST} layers; {count(left, 'layer')} more are in the tables")
    if as_json:
        say(json.dumps(_contents(report, place)))
    else:
        _print(request, report, place, picture)


def _raced(request: Request, errors: Any, quiet: bool) -> Report:
    """Run the races, with a bar on a terminal."""
    with progress(errors, "{task.completed}/{task.total}", quiet=quiet) as bar:
        task = bar.add_task("building the layers", total=None)
        return run_bench(
            request, lambda what, done, races: bar.update(task, description=what, completed=done, total=races)
        )


def _place(request: Request) -> str:
    return f"{device_name(request.device)}, PyTorch {torch.__version__}, sparsekern {sparsekern.__version__}"


def _contents(report: Report, place: str) -> dict[str, Any]:
    return {
        "place": place,
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "rows": report.rows,
        "break_even": list(break_evens(report.rows)),
        "notes": report.notes,
        "busy": report.busy,
    }


def _print(request: Request, report: Report, place: str, picture: Path | None) -> None:
    console = PlainConsole()
    if not console.is_terminal:
        console.width = WIDTH
    if request.model is None:
        for group, rows in groups(report.rows).items():
            console.print(_table(group_title(group), table_cells(rows)))
    else:
        kinds = dict.fromkeys((row["dtype"], row["threads"]) for row in report.rows)
        for dtype, threads in kinds:
            rows = [row for row in report.rows if (row["dtype"], row["threads"]) == (dtype, threads)]
            title = group_title((f"{request.model}, forward + backward", dtype, threads))
            console.print(_table(title, model_cells(rows)))
    lines = [place, f"x: times as fast as dense, {SLOWER} where it is not"]
    if request.model is None:
        lines[-1] += "; in parentheses the quartiles"
        lines.append("break-even: interpolated linearly between the measured times as fractions of the dense one")
    else:
        lines.append("all layers: each as often as it occurs, those that cannot be sparse dense")
    lines += report.notes
    lines += [] if picture is None else [f"picture: {picture}"]
    say("\n".join(lines))
    if report.busy is not None:
        say(f"warning: {report.busy}")


def _table(title: str, cells: Cells) -> Table:
    """Return a table; cells that are slower than dense are red on a terminal."""
    heading, lines = cells
    made = Table(title=title, title_justify="left", title_style="bold")
    for name in heading:
        made.add_column(name, justify="left" if name in ("pass", "layer") else "right", no_wrap=True)
    for line, following in zip(lines, [*lines[1:], None], strict=True):
        ends = following is None or following[0] != line[0]
        made.add_row(*(Text(cell, style="red" if SLOWER in cell else "") for cell in line), end_section=ends)
    return made
