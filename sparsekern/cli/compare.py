"""``sparsekern compare``: several methods, sparsities and block sizes on one recipe."""

from __future__ import annotations

import json
import shlex
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD

from sparsekern.cli.options import NETWORK, RUN, Json, Quiet, absolute, given, option, sparsity_of, takes
from sparsekern.cli.shell import CtrlC, Live, PlainConsole, check_one_process, error_console, explained, say, table
from sparsekern.lab.compare import PICTURE, TABLE, compare, contestant, default_folder, is_finished, plan_for
from sparsekern.lab.report.tables import aligned, comparison_cells, comparison_notes
from sparsekern.lab.store import PLAN
from sparsekern.training import METHODS, PRESETS

WIDTH = 132
"""Columns of the table where there is no terminal."""

QUICK = {"seeds": 1, "epochs": 1}
"""What ``--quick`` says where nothing else is said."""


LISTED = ("method", "preset", "sparsity", "block_size")
"""Options of a run of which a comparison takes several values."""

SHARED = {name: annotation for name, annotation in RUN.items() if name not in (*LISTED, "sparse", "paper")}
"""Options that all runs of a comparison share."""


@takes(values=SHARED, network=NETWORK)
def compare_methods(
    *,
    method: Annotated[
        list[str] | None,
        option(
            f"A method to compare: {', '.join(METHODS)}. Its options after a colon, such as "
            "gse:distribution=grabo,subset_factor=2 (`sparsekern train --help` lists them). Repeat it for more.",
            "all methods",
        ),
    ] = None,
    preset: Annotated[
        list[str] | None,
        option(f"A publication's method and options: {', '.join(PRESETS)}. Options as above. Repeat it.", "none"),
    ] = None,
    sparsity: Annotated[
        list[str] | None,
        option("Fraction absent, or one for each kind of layers: mlp=0.9,attention=0.7. Repeat it.", "the recipe's"),
    ] = None,
    block_size: Annotated[list[int] | None, option("Side of the blocks. Repeat it for more.", "the recipe's")] = None,
    values: dict[str, Any],
    network: dict[str, Any],
    quick: Annotated[bool, typer.Option("--quick", help="One seed and one epoch, unless others are given.")] = False,
    out: Annotated[
        Path | None, option("Folder of the comparison. If it holds one, that goes on.", "runs/<date-time>-compare")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train several methods on one recipe and put their accuracies, times and costs side by side.

    Every combination of a method, a sparsity and a block size is a run of all seeds in a folder of its own; the dense
    twin is trained once. Called again with the same --out, it goes on where it stopped and skips what is finished;
    methods, sparsities and block sizes may be added then.
    """
    dense = values.pop("dense", None)
    values |= given(data=absolute(values.get("data")), network=network or None)
    errors = error_console()
    folder = out or default_folder(datetime.now())
    with (
        explained(errors, lambda saved: _how_to_go_on(folder, saved=saved), compare_methods),
        CtrlC() as interrupt,
        Live(errors, interrupt.asked, quiet=quiet) as live,
    ):
        check_one_process("sparsekern compare")
        contestants = [contestant(text) for text in method or ()]
        contestants += [contestant(text, preset=True) for text in preset or ()]
        plan = plan_for(
            folder,
            (QUICK | values) if quick else values,
            contestants,
            [sparsity_of(text) for text in sparsity or ()],
            block_size or (),
            dense,
        )
        if is_finished(plan, folder):
            errors.print(f"{folder} is finished: nothing is left to train. This is what came out")
        content = compare(plan, folder, live)
    if as_json:
        say(json.dumps(content | {"folder": str(folder)}))
    else:
        console = PlainConsole()
        if not console.is_terminal:
            console.width = WIDTH
        cells = comparison_cells(content["rows"])
        console.print(table(f"{content['data']['name']}, {plan.base.network_title}", cells, len(cells[0]), SIMPLE_HEAD))
        say(aligned(comparison_notes(content)))
        say(f"{folder}: {TABLE}.json, {TABLE}.md, the picture {folder / PICTURE}, a folder for each run")


def _how_to_go_on(folder: Path, *, saved: bool) -> str:
    if not (folder / PLAN).is_file():
        return "stopped before training began; nothing is saved"
    state = "saved" if saved else "stopped at once; what the last epoch saved is kept"
    return f"{state}. To go on: sparsekern compare --out {shlex.quote(str(folder))}"
