"""Several options that a command takes as one dictionary, so that commands share them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import typer


def option(text: str, default: object, *names: str) -> Any:
    """Return an option that is None unless it is given: its default is that of :class:`~sparsekern.lab.Config`."""
    return typer.Option(*names, help=text, show_default=str(default))


def given(**values: Any) -> dict[str, Any]:
    """Return the values that were given."""
    return {name: value for name, value in values.items() if value is not None}


def expanded(command: Callable[..., None], name: str, annotations: Mapping[str, Any]) -> Callable[..., None]:
    """Give a command options in the place of one parameter; it receives those that were given as a dictionary.

    Typer reads a command's signature: that of what this returns has the options where ``command`` has ``name``.

    Args:
        command: with the parameter.
        name: of the parameter.
        annotations: of the options, by name, each with None for its default.
    """
    signature = inspect.signature(command, eval_str=True)
    everything: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        here: Sequence[inspect.Parameter] = [parameter]
        if parameter.name == name:
            kind = inspect.Parameter.KEYWORD_ONLY
            here = [inspect.Parameter(n, kind, default=None, annotation=a) for n, a in annotations.items()]
        everything += [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in here]

    @functools.wraps(command)
    def with_options(**values: Any) -> None:
        mine = given(**{option: values.pop(option) for option in annotations})
        command(**values, **{name: mine})

    with_options.__signature__ = signature.replace(parameters=everything)  # type: ignore[attr-defined]
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in everything}
    return with_options
