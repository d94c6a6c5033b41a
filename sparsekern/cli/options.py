"""The options that say what is trained and how, for every command that trains."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsekern.errors import InputError
from sparsekern.lab import Config
from sparsekern.lab.checkpoint import Keeping
from sparsekern.lab.config import FROM_RECIPE, RUN_OPTIONS
from sparsekern.lab.distributed import Launch
from sparsekern.lab.options import NETWORK_OPTIONS, OPTIONS, Option, declared
from sparsekern.lab.recipes import RECIPES

MLP = Config()
"""The default recipe, whose values the help shows."""

Json = Annotated[bool, typer.Option("--json", help="Print the results as one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress, only the results.")]


def option(text: str, default: object, *names: str) -> Any:
    """Return an option that is None unless it is given."""
    return typer.Option(*names, help=text, show_default=str(default))


def given(**values: Any) -> dict[str, Any]:
    """Return the values that were given."""
    return {name: value for name, value in values.items() if value is not None}


def takes(**groups: Mapping[str, Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that gives a command options in the place of some parameters.

    The command receives those of a group that were given as one dictionary. Typer reads a command's signature: that of
    what the decorator returns has the options where the command has the name of a group.

    Args:
        groups: annotations of options by their names, each with None for its default.
    """

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        kind = inspect.Parameter.KEYWORD_ONLY
        everything: list[inspect.Parameter] = []
        for parameter in signature.parameters.values():
            annotations = groups.get(parameter.name)
            if annotations is None:
                everything.append(parameter.replace(kind=kind))
            else:
                everything += [inspect.Parameter(n, kind, default=None, annotation=a) for n, a in annotations.items()]

        @wraps(command)
        def with_options(**values: Any) -> None:
            for name, annotations in groups.items():
                values[name] = given(**{option: values.pop(option) for option in annotations})
            command(**values)

        with_options.__signature__ = signature.replace(parameters=everything)  # type: ignore[attr-defined]
        with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in everything}
        return with_options

    return decorated


def annotation(option: Option, default: str = "", panel: str | None = None, owners: str = "") -> Any:
    """Return an option as typer takes it."""
    text = option.text
    if option.choices:
        text = text.replace(".", f": {', '.join(option.choices)}.", 1)
    shown = typer.Option(
        help=f"{text}{owners}".replace("[", r"\["),
        show_default=default or option.default or False,
        rich_help_panel=panel,
    )
    kind: Any = list[str] if option.kind is list else option.kind
    return Annotated[kind | None, shown]


def _of_network(name: str) -> str:
    defaults = {recipe.name: recipe.network[name] for recipe in RECIPES.values() if name in recipe.network}
    return "; ".join(f"{recipe}: {str(value).lower()}" for recipe, value in defaults.items())


RUN: dict[str, Any] = {
    name: annotation(entry, f"the recipe's; {MLP.recipe}: {getattr(MLP, name)}" if name in FROM_RECIPE else "")
    for name, entry in (RUN_OPTIONS | {"sparsity": replace(RUN_OPTIONS["sparsity"], kind=list)}).items()
}
KEEPING: dict[str, Any] = {entry.name: annotation(entry) for entry in declared(Keeping)}
LAUNCH: dict[str, Any] = {entry.name: annotation(entry, panel="Options under torchrun") for entry in declared(Launch)}
NETWORK: dict[str, Any] = {
    name: annotation(entry, _of_network(name), "Options of networks") for name, entry in NETWORK_OPTIONS.items()
}
METHOD: dict[str, Any] = {
    name: annotation(entry, "", "Options of methods", f" [{entry.owners}]") for name, entry in OPTIONS.items()
}
"""The options of a run, its checkpoints, its processes, of networks and methods, by name, as typer takes them."""


def absolute(path: str | None) -> str | None:
    """Return a path that means the same from another folder."""
    return None if path is None else str(Path(path).expanduser().resolve())


def sparsity_of(text: str) -> float | dict[str, float]:
    """Return what ``0.9`` or ``mlp=0.9,attention=0.7`` says: one number, or one for each kind of layers.

    Raises:
        InputError: it is neither.
    """
    by_kind: dict[str, float] = {}
    parts = text.split(",")
    for part in parts:
        kind, _, number = part.rpartition("=")
        try:
            by_kind[kind.strip()] = float(number)
        except ValueError:
            raise InputError(
                f"sparsity is {text!r}; it must be a number such as 0.9, or one for each kind of layers such as "
                "mlp=0.9,attention=0.7",
                parameter="sparsity",
            ) from None
    if len(by_kind) < len(parts) or ("" in by_kind and len(parts) > 1):
        raise InputError(
            f"sparsity is {text!r}; give one number, or one for each kind of layers such as mlp=0.9,attention=0.7",
            parameter="sparsity",
        )
    return by_kind.get("", by_kind)
