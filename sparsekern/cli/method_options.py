"""The options of the methods on the command line, from their table."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from sparsekern.cli.expand import expanded
from sparsekern.lab.config import STOP
from sparsekern.lab.options import OPTIONS, Option
from sparsekern.training import AGENT, METHODS
from sparsekern.transforms import transform

PANEL = "Options of methods"

WRAPPERS: dict[str, Callable[..., Any]] = {"agent": AGENT, "transform": transform}
"""What takes the options of a part, whose names begin with that of the part."""


def takes_method_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command every option of the table; it receives those that were given as one dictionary ``options``."""
    return expanded(command, "options", {option.name: _annotation(option) for option in OPTIONS.values()})


def _annotation(option: Option) -> Any:
    text = f"{option.text} [{option.owners}]"
    if option.choices:
        text = f"{option.text.removesuffix('.')}: {', '.join(option.choices)}. [{option.owners}]"
    shown = typer.Option(help=text.replace("[", r"\["), show_default=_default(option), rich_help_panel=PANEL)
    return Annotated[option.kind | None, shown]


def _default(option: Option) -> str | bool:
    """Return the default that the constructors have, or False where it is no plain value."""
    if option.name == "stop":
        return f"{STOP:g}"
    if option.part in WRAPPERS:
        own = inspect.signature(WRAPPERS[option.part]).parameters.get(option.name.removeprefix(f"{option.part}_"))
        return False if own is None or own.default is None else str(own.default)
    defaults = {name: _of_constructor(option.name, name) for name in option.methods}
    plain = {name: str(value) for name, value in defaults.items() if value is not None}
    if not plain:
        return False
    first = next(iter(plain.values()))
    return "; ".join([first, *(f"{name}: {value}" for name, value in plain.items() if value != first)])


def _of_constructor(argument: str, method: str) -> object:
    for cls in METHODS[method].__mro__[:-1]:
        parameter = inspect.signature(cls).parameters.get(argument)
        if parameter is not None:
            return parameter.default
        if hasattr(cls, argument):  # such as ``pool``
            return getattr(cls, argument)
    return None
