"""``sparsekern train``: a block-sparse network beside its dense twin."""

from __future__ import annotations

import json
import shlex
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from sparsekern.cli.options import (
    KEEPING,
    LAUNCH,
    METHOD,
    NETWORK,
    RUN,
    Quiet,
    absolute,
    given,
    option,
    sparsity_of,
    takes,
)
from sparsekern.cli.shell import CtrlC, Live, PlainConsole, error_console, explained, say, table
from sparsekern.errors import InputError
from sparsekern.lab import Config, Logged, resume
from sparsekern.lab.checkpoint import Keeping
from sparsekern.lab.distributed import Launch, joined, launched
from sparsekern.lab.papers import FAMILIES, PAPERS, deviations, with_paper
from sparsekern.lab.recipes import RECIPES
from sparsekern.lab.report.tables import aligned, result_cells, result_notes, result_title, written_texts
from sparsekern.lab.resolved import resolve
from sparsekern.lab.run import start_resolved
from sparsekern.lab.store import CONFIG, PICTURE, RESULTS, SPECTRAL, default_folder, read_config

SHOWN = 300
"""Characters of a network's text that are printed; the page of the run has all of them."""


@takes(values=RUN, keeping=KEEPING, launch=LAUNCH, network=NETWORK, options=METHOD)
def train(
    *,
    values: dict[str, Any],
    out: Annotated[
        Path | None, option("Folder for everything the run writes.", "runs/<date-time>-<method>-<sparsity>")
    ] = None,
    resume_: Annotated[
        Path | None,
        typer.Option("--resume", help="Go on with the run in this folder, exactly where it stopped.", metavar="FOLDER"),
    ] = None,
    keeping: dict[str, Any],
    log_to: Annotated[
        Path | None, option("Folder for TensorBoard, which shows the numbers of each epoch.", "none")
    ] = None,
    list_: Annotated[
        bool, typer.Option("--list", help="Show the recipes and papers, and where they come from.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results, or the list, as JSON.")] = False,
    quiet: Quiet = False,
    launch: dict[str, Any],
    network: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """Train a block-sparse network and its dense twin side by side, and compare them.

    Ctrl-C saves everything and says how to go on. Under torchrun, all processes train one run together.
    """
    if list_:
        if as_json:
            say(json.dumps({"recipes": recipe_values(), "papers": list(PAPERS)}))
        else:
            PlainConsole().print(recipe_table())
            say(paper_list())
        return
    values |= given(data=absolute(values.get("data")), network=network or None, options=options or None)
    errors = error_console()
    folder = resume_ or out
    with (
        explained(errors, lambda saved: _how_to_go_on(folder, saved=saved), train),
        CtrlC() as interrupt,
        joined(launched().alike(lambda: Launch(**launch)), values.get("device")) as world,
        Live(errors, interrupt.asked, quiet=quiet or not world.first) as live,
    ):
        observer = live if log_to is None or not world.first else Logged(live, log_to)
        if "sparsity" in values:
            values["sparsity"] = world.alike(lambda: sparsity_of(",".join(values["sparsity"])))
        if resume_ is not None:
            going_on = resume_
            finished = world.on_first(lambda: _check_agreement(going_on, values, out)) and world.first
            run = resume(going_on, observer, world, **keeping)
            if finished:
                errors.print(f"{resume_} is finished: nothing is left to train. This is what came out")
        else:
            config, kept = world.alike(lambda: (Config(**with_paper(values)), Keeping(**keeping)))
            folder = out or world.on_first(lambda: default_folder(config, datetime.now()))
            resolved = world.together(lambda: resolve(config, config.load(), world))
            if world.first and not quiet:
                for text in deviations(resolved.config, resolved.task.describe()):
                    errors.print(f"not as published: {text}")
            run = start_resolved(resolved, folder, observer, kept)
    if not world.first:
        return
    assert folder is not None
    if as_json:
        say(json.dumps(run.results | {"folder": str(folder)}))
    else:
        title, cells = result_title(run.config, run.results), result_cells(run.results)
        PlainConsole().print(table(title, cells, len(run.results["networks"])))
        say(aligned(result_notes(run.results)))
        for name, text in written_texts(run.results).items():
            say(f"\nthe {name} network writes:\n{text[:SHOWN]}\n")
        drawn = [str(folder / name) for name in (PICTURE, SPECTRAL) if (folder / name).is_file()]
        pictures = f", and the picture{'s' * (len(drawn) > 1)} {' and '.join(drawn)}" if drawn else ""
        say(f"{folder}: config, metrics, checkpoints{pictures}")


def _how_to_go_on(folder: Path | None, *, saved: bool) -> str:
    first = launched().first
    if folder is None or (first and not (folder / CONFIG).is_file()):
        return "stopped before training began; nothing is saved"
    state = "saved" if saved else f"stopped at once; what {'was saved' if first else 'rank 0 saved'} last is kept"
    return f"{state}. To go on: sparsekern train --resume {shlex.quote(str(folder))}"


def _check_agreement(folder: Path, values: dict[str, Any], out: Path | None) -> bool:
    """Raise ValueError if an option contradicts the run that is resumed; return whether it is finished."""
    if out is not None and out.resolve() != folder.resolve():
        raise InputError(f"--out is {out}, but a resumed run stays in its folder {folder}; drop --out")
    config = read_config(folder).config.to_json()
    config |= config.pop("options") | config.pop("network")
    for name, value in (values | values.get("options", {}) | values.get("network", {})).items():
        if name not in ("options", "network") and value != config.get(name):
            has = config.get(name, "it not given")
            raise InputError(
                f"{name} is {value}, but the run in {folder} has {has}; drop the option, "
                "or start a new run without --resume",
                parameter=name,
            )
    return (folder / RESULTS).is_file()


def recipe_table() -> Table:
    """Return the table of all recipes, narrow enough for a terminal of 80 columns; the first one is the default."""
    table = Table(box=SIMPLE_HEAD, caption="The first one is the default.", caption_justify="left")
    table.add_column("recipe", no_wrap=True)
    for heading in ("rate", "batch", "epochs"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("source")
    for recipe in RECIPES.values():
        epochs = "20 or 5" if recipe.epochs is None else str(recipe.epochs)
        table.add_row(recipe.name, f"{recipe.rate:g}", str(recipe.batch_size), epochs, recipe.source)
    return table


def paper_list() -> str:
    """Return the names for ``--paper``, a line for each family of them, with the publication below it."""
    lines = [f"{family.pattern}\n    {family.source}" for family in FAMILIES]
    return "\n".join(["Papers, whole trainings for --paper; of words in braces take one:", *lines])


def recipe_values() -> list[dict[str, Any]]:
    """Return the recipes as plain values, in the order of the table; ``epochs`` is None where the data decide."""
    names = ("name", "title", "source", "rate", "batch_size", "epochs", "block_size", "distribution", "augmentation")
    return [{name: getattr(recipe, name) for name in names} for recipe in RECIPES.values()]
