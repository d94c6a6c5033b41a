"""The options that say what is trained and how, for every command that trains."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparsekern.recipes import Config
from sparsekern.recipes.augment import AUGMENTATIONS

MLP = Config()
"""The default recipe, whose values the help shows."""


def option(text: str, default: object, *names: str) -> Any:
    """Return an option that is None unless it is given: its default is that of :class:`Config`."""
    return typer.Option(*names, help=text, show_default=str(default))


def of_recipe(name: str) -> str:
    """Return how the help shows the default of what the recipe decides."""
    return f"the recipe's; {MLP.recipe}: {getattr(MLP, name)}"


def absolute(path: str | None) -> str | None:
    """Return a path that means the same from another folder."""
    return None if path is None else str(Path(path).expanduser().resolve())


def given(**values: Any) -> dict[str, Any]:
    """Return the values that were given."""
    return {name: value for name, value in values.items() if value is not None}


Recipe = Annotated[
    str | None, option("Network and training; `sparsekern train --list` shows what there is.", MLP.recipe, "--recipe")
]
Data = Annotated[
    str | None,
    option(
        "An .npz file (train_images, train_labels, test_images, test_labels), CIFAR as a folder or .tar.gz, or a "
        "folder of IDX files.",
        "scikit-learn's digits",
    ),
]
Width = Annotated[int | None, option("Features of the hidden layers of the mlp.", MLP.width)]
WidthMultiplier = Annotated[
    float | None, option("Times the published channels of any other network.", MLP.width_multiplier)
]
Augment = Annotated[
    str | None, option(f"How images are varied: {', '.join(AUGMENTATIONS)}.", "the recipe's; grey images: none")
]
Epochs = Annotated[
    int | None, option("Passes over the training set.", "the recipe's; mlp: 20, or 5 with more than 10 000 images")
]
BatchSize = Annotated[int | None, option("Images a step.", of_recipe("batch_size"))]
Rate = Annotated[float | None, option("Learning rate at its highest.", of_recipe("rate"))]
UpdateEvery = Annotated[
    int | None,
    option("Steps between moves of blocks.", "about 8 moves, at most as far apart as the recipe says"),
]
Seeds = Annotated[int | None, option("Number of seeds to train.", of_recipe("seeds"))]
Device = Annotated[str | None, option("cpu, cuda or cuda:<number>.", "cuda where there is one")]
Dense = Annotated[bool | None, option("Train the dense twin too.", "dense", "--dense/--no-dense")]
Json = Annotated[bool, typer.Option("--json", help="Print the results as one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress, only the results.")]
