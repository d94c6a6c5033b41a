"""``sparsekern train``: a block-sparse network beside its dense twin."""

from __future__ import annotations

import json
import shlex
import signal
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console

from sparsekern.cli.listing import recipe_table, recipe_values
from sparsekern.cli.live import Live
from sparsekern.cli.method_options import takes_method_options
from sparsekern.cli.table import notes, result_table
from sparsekern.recipes import Config, Interrupted, resume, start
from sparsekern.recipes.augment import AUGMENTATIONS
from sparsekern.recipes.folder import CONFIG, PICTURE, default_folder, read_config
from sparsekern.training import METHODS, PRESETS

USAGE_ERROR, INTERRUPTED = 2, 130

MLP = Config()
"""The default recipe, whose values the help shows."""


def _option(text: str, default: object, *names: str) -> Any:
    """Return an option that is None unless it is given: its default is that of :class:`Config`."""
    return typer.Option(*names, help=text, show_default=str(default))


def _of_recipe(name: str) -> str:
    return f"the recipe's; {MLP.recipe}: {getattr(MLP, name)}"


NO_MEMORY = ("can't allocate memory", "bad_alloc", "out of memory", "ALLOC_FAILED")
"""What PyTorch says when there is not enough memory, on a CPU and on CUDA."""


@takes_method_options
def train(
    recipe: Annotated[
        str | None, _option("Network and training; --list shows what there is.", MLP.recipe, "--recipe")
    ] = None,
    data: Annotated[
        str | None,
        _option(
            "An .npz file (train_images, train_labels, test_images, test_labels), CIFAR as a folder or .tar.gz, or a "
            "folder of IDX files.",
            "scikit-learn's digits",
        ),
    ] = None,
    sparsity: Annotated[
        float | None, _option("Fraction of the hidden weights that is absent.", Config.sparsity)
    ] = None,
    block_size: Annotated[int | None, _option("Side of the blocks.", _of_recipe("block_size"))] = None,
    method: Annotated[str | None, _option(f"How blocks move: {', '.join(METHODS)}.", MLP.method)] = None,
    preset: Annotated[str | None, _option(f"A publication's method and options: {', '.join(PRESETS)}.", "none")] = None,
    width: Annotated[int | None, _option("Features of the hidden layers of the mlp.", MLP.width)] = None,
    width_multiplier: Annotated[
        float | None, _option("Times the published channels of any other network.", MLP.width_multiplier)
    ] = None,
    augment: Annotated[
        str | None, _option(f"How images are varied: {', '.join(AUGMENTATIONS)}.", "the recipe's; grey images: none")
    ] = None,
    epochs: Annotated[
        int | None,
        _option("Passes over the training set.", "the recipe's; mlp: 20, or 5 with more than 10 000 images"),
    ] = None,
    batch_size: Annotated[int | None, _option("Images a step.", _of_recipe("batch_size"))] = None,
    rate: Annotated[float | None, _option("Learning rate at its highest.", _of_recipe("rate"))] = None,
    update_every: Annotated[
        int | None, _option("Steps between moves of blocks.", "about 8 moves, at most as far apart as the recipe says")
    ] = None,
    seeds: Annotated[int | None, _option("Number of seeds to train.", _of_recipe("seeds"))] = None,
    device: Annotated[str | None, _option("cpu, cuda or cuda:<number>.", "cuda where there is one")] = None,
    dense: Annotated[bool | None, _option("Train the dense twin too.", "dense", "--dense/--no-dense")] = None,
    out: Annotated[
        Path | None, _option("Folder for everything the run writes.", "runs/<date-time>-<method>-<sparsity>")
    ] = None,
    resume_: Annotated[
        Path | None,
        typer.Option("--resume", help="Go on with the run in this folder, exactly where it stopped.", metavar="FOLDER"),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="Show the recipes and where they come from.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results, or the list, as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress, only the results.")] = False,
    *,
    options: dict[str, Any],
) -> None:
    """Train a block-sparse network and its dense twin side by side, and compare them.

    Ctrl-C saves everything and says how to go on.
    """
    if list_:
        _show_recipes(as_json=as_json)
        return
    values: dict[str, Any] = {
        "recipe": recipe,
        "data": None if data is None else str(Path(data).expanduser().resolve()),
        "sparsity": sparsity,
        "block_size": block_size,
        "method": method,
        "preset": preset,
        "options": options or None,
        "width": width,
        "width_multiplier": width_multiplier,
        "augment": augment,
        "epochs": epochs,
        "batch_size": batch_size,
        "rate": rate,
        "update_every": update_every,
        "seeds": seeds,
        "device": device,
        "dense": dense,
    }
    given = {name: value for name, value in values.items() if value is not None}
    errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    folder = None
    try:
        with _CtrlC() as interrupt, Live(errors, interrupt.asked, quiet=quiet) as live:
            if resume_ is not None:
                folder = resume_
                _check_agreement(folder, given, out)
                results = resume(folder, live)
            else:
                config = Config(**given)
                folder = out or default_folder(config, datetime.now())
                results = start(config, folder, live)
    except ValueError as error:
        errors.print(f"error: {error}")
        raise typer.Exit(USAGE_ERROR) from None
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY)):
            raise
        errors.print("error: the memory does not suffice; choose a smaller width, batch size or data set")
        raise typer.Exit(USAGE_ERROR) from None
    except (Interrupted, KeyboardInterrupt) as stop:
        errors.print(_how_to_go_on(folder, saved=isinstance(stop, Interrupted)))
        raise typer.Exit(INTERRUPTED) from None
    if as_json:
        typer.echo(json.dumps(results | {"folder": str(folder)}))
    else:
        Console().print(result_table(results))
        typer.echo(notes(results))
        typer.echo(f"{folder}: config, metrics, checkpoints, and the picture {folder / PICTURE}")


def _show_recipes(*, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(recipe_values()))
    else:
        Console().print(recipe_table())


def _how_to_go_on(folder: Path | None, *, saved: bool) -> str:
    if folder is None or not (folder / CONFIG).is_file():
        return "stopped before training began; nothing is saved"
    state = "saved" if saved else "stopped at once; what the last epoch saved is kept"
    return f"{state}. To go on: sparsekern train --resume {shlex.quote(str(folder))}"


def _check_agreement(folder: Path, given: dict[str, Any], out: Path | None) -> None:
    """Raise ValueError if an option says something else than the run that is resumed."""
    if out is not None and out.resolve() != folder.resolve():
        raise ValueError(f"--out is {out}, but a resumed run stays in its folder {folder}; drop --out")
    config = read_config(folder)[0].to_json()
    config |= config.pop("options")
    for name, value in (given | given.get("options", {})).items():
        if name != "options" and value != config.get(name):
            has = config.get(name, "it not given")
            raise ValueError(
                f"{name} is {value}, but the run in {folder} has {has}; drop the option, "
                "or start a new run without --resume"
            )


class _CtrlC:
    """Turns the first Ctrl-C into a request, which the loop reads between two steps; a second one ends at once.

    A KeyboardInterrupt in the middle of a step would leave weights and optimizer state of different steps.
    """

    def __init__(self) -> None:
        self._asked = False
        self._previous: Any = None

    def asked(self) -> bool:
        return self._asked

    def __enter__(self) -> _CtrlC:
        self._previous = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
