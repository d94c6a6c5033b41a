"""``sparsekern train --list``: the recipes, one line each."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from sparsekern.lab.catalogue import RECIPES, Recipe


def recipe_table() -> Table:
    """Return the table of all recipes, narrow enough for a terminal of 80 columns; the first one is the default."""
    table = Table(box=SIMPLE_HEAD, caption="The first one is the default.", caption_justify="left")
    table.add_column("recipe", no_wrap=True)
    for heading in ("rate", "batch", "epochs"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("source")
    for recipe in RECIPES.values():
        table.add_row(recipe.name, f"{recipe.rate:g}", str(recipe.batch_size), _epochs(recipe), recipe.source)
    return table


def recipe_values() -> list[dict[str, Any]]:
    """Return the recipes as plain values, in the order of the table; ``epochs`` is None where the data decide."""
    names = ("name", "title", "source", "rate", "batch_size", "epochs", "block_size", "distribution", "augmentation")
    return [{name: getattr(recipe, name) for name in names} for recipe in RECIPES.values()]


def _epochs(recipe: Recipe) -> str:
    return "20 or 5" if recipe.epochs is None else str(recipe.epochs)
