"""The options that say what is trained and how, for every command that trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsekern.cli.expand import expanded, option
from sparsekern.lab import Config
from sparsekern.lab.augment import AUGMENTATIONS

MLP = Config()
"""The default recipe, whose values the help shows."""


def of_recipe(name: str) -> str:
    """Return how the help shows the default of what the recipe decides."""
    return f"the recipe's; {MLP.recipe}: {getattr(MLP, name)}"


def absolute(path: str | None) -> str | None:
    """Return a path that means the same from another folder."""
    return None if path is None else str(Path(path).expanduser().resolve())


def takes_run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command :data:`RUN_OPTIONS`; it receives those that were given as one dictionary ``values``."""
    return expanded(command, "values", RUN_OPTIONS)


RUN_OPTIONS: dict[str, Any] = {
    "recipe": Annotated[
        str | None,
        option("Network and training; `sparsekern train --list` shows what there is.", MLP.recipe, "--recipe"),
    ],
    "data": Annotated[
        str | None,
        option(
            "An .npz file (train_images, train_labels, test_images, test_labels), CIFAR as a folder or .tar.gz, or a "
            "folder of IDX files.",
            "scikit-learn's digits",
        ),
    ],
    "data_max_gib": Annotated[
        float | None,
        option("GiB that the data may ask for; large files may ask for 16 times their own size.", Config.data_max_gib),
    ],
    "width": Annotated[int | None, option("Features of the hidden layers of the mlp.", MLP.width)],
    "width_multiplier": Annotated[
        float | None, option("Times the published channels of any other network.", MLP.width_multiplier)
    ],
    "augment": Annotated[
        str | None, option(f"How images are varied: {', '.join(AUGMENTATIONS)}.", "the recipe's; grey images: none")
    ],
    "epochs": Annotated[
        int | None, option("Passes over the training set.", "the recipe's; mlp: 20, or 5 with more than 10 000 images")
    ],
    "batch_size": Annotated[int | None, option("Images a step.", of_recipe("batch_size"))],
    "rate": Annotated[float | None, option("Learning rate at its highest.", of_recipe("rate"))],
    "update_every": Annotated[
        int | None,
        option("Steps between moves of blocks.", "about 8 moves, at most as far apart as the recipe says"),
    ],
    "seeds": Annotated[int | None, option("Number of seeds to train.", of_recipe("seeds"))],
    "device": Annotated[str | None, option("cpu, cuda or cuda:<number>.", "cuda where there is one")],
    "dense": Annotated[bool | None, option("Train the dense twin too.", "dense", "--dense/--no-dense")],
}
"""By name: entries of a :class:`~sparsekern.lab.Config` that every command takes that trains."""

Json = Annotated[bool, typer.Option("--json", help="Print the results as one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress, only the results.")]
