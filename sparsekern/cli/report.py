"""``sparsekern report``: a page about a run, in one file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer

from sparsekern.analysis import Summary
from sparsekern.cli.info import device_name
from sparsekern.cli.shell import check_file, error_console, explained, say
from sparsekern.errors import InputError
from sparsekern.lab.cost import measure
from sparsekern.lab.report.page import MARK, page_contents, page_values, render, results_so_far
from sparsekern.lab.report.tables import count
from sparsekern.lab.store import Record, read_record, write_text

PAGE = "report.html"


def report(
    run: Annotated[Path, typer.Argument(help="The folder of a run, finished or not.", metavar="RUN")],
    out: Annotated[
        Path | None, typer.Option(help="The page; an earlier page there is replaced.", show_default=f"RUN/{PAGE}")
    ] = None,
    timed: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Time the layers on this machine, beside dense ones.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers of the page as JSON.")] = False,
) -> None:
    """Write a page about a run: one HTML file, which loads nothing else.

    It shows the table, the curves, where the blocks were over time, and what each layer stores and how long it takes.
    """
    page = run / PAGE if out is None else out
    with explained(error_console(), lambda saved: "stopped; the page is not written", report):
        record = read_record(run)
        check_target(page)
        account, sizes, where = _measured(record, timed=timed)
        results = results_so_far(record, sizes)
        text = render(page_contents(record, results, account, where))
        try:
            write_text(page, text)
        except OSError as error:
            raise InputError(
                f"out is {page}, which cannot be written ({error.strerror}); choose another --out", parameter="out"
            ) from None
    if as_json:
        say(json.dumps(page_values(record, results, account) | {"page": str(page)}))
    else:
        for text in record.missing:
            say(f"note: {text}")
        say(f"{page}: open it in a browser")


def check_target(page: Path) -> None:
    """Check before any work that a page may be written there.

    Raises:
        ValueError: the folder is not there, or there is something that is no page.
    """
    check_file(page, "out", "another --out")
    if page.exists():
        with page.open("rb") as file:
            if file.read(len(MARK)) != MARK.encode():
                raise InputError(
                    f"out is {page}, which exists and is no page of sparsekern; choose another --out", parameter="out"
                )


def _measured(record: Record, *, timed: bool) -> tuple[Summary | None, dict[str, dict[str, int]] | None, str]:
    """Return the account of the layers, the sizes of the networks, and where the layers were timed."""
    if record.checkpoint is None:
        return None, None, ""
    try:
        account, sizes = measure(record.config, record.data, record.checkpoint, timed=timed)
    except InputError as error:
        record.missing.append(f"Sizes and times of the layers: {error}.")
        return None, None, ""
    if not timed:
        record.missing.append("The layers were not timed (--no-measure).")
    where = device_name(torch.device(str(record.config.device)))
    return account, sizes, f"measured for this page on {where}, {count(torch.get_num_threads(), 'thread')}"
