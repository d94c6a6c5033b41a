"""Selectors of modules: a type, a name, a glob, ``re:`` and a pattern, a function, or a list of these."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from sparsekern.errors import InputError

Selector = type | str | Callable[[nn.Module, str], bool] | Iterable[Any]


def flatten(selector: Selector) -> list[Any]:
    """Return the selectors in a nested list, or a single selector as a list."""
    if isinstance(selector, (str, type)) or callable(selector):
        return [selector]
    if not isinstance(selector, Iterable):
        raise TypeError(
            f"a selector is {selector!r}; it must be a type, a name, a glob, 're:<pattern>', a function (module, name) "
            "-> bool, or a list of these"
        )
    return [single for item in selector for single in flatten(item)]


def matches(single: Any, module: nn.Module, name: str) -> bool:
    """Return whether a single selector matches a module with this name."""
    if isinstance(single, type):
        return isinstance(module, single)
    return matches_name(single, name) if isinstance(single, str) else bool(single(module, name))


def matches_name(single: str, name: str) -> bool:
    """Return whether a string selector matches a name: an exact name, a glob, or ``re:`` and a pattern."""
    if single.startswith("re:"):
        try:
            return re.match(single[3:], name) is not None
        except re.error as error:
            raise InputError(f"selector {single!r} is not a regular expression: {error}; correct the pattern") from None
    return name == single or fnmatch.fnmatchcase(name, single)


def select(model: nn.Module, selector: Selector, argument: str) -> dict[str, nn.Module]:
    """Return the modules inside a model that a selector matches, by name, in the model's order.

    Args:
        model: the model, which itself is not searched.
        selector: a type, a name, a glob, ``"re:<pattern>"``, a function ``(module, name) -> bool``, or a list of these.
        argument: the user's name for the selector, for the error.

    Raises:
        ValueError: a selector matches nothing; the message lists the nearest names.
    """
    named = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    chosen: set[str] = set()
    for single in flatten(selector):
        found = {name for name, module in named.items() if matches(single, module, name)}
        if not found:
            what = repr(single) if isinstance(single, str) else getattr(single, "__qualname__", repr(single))
            raise InputError(
                f"{argument}: {what} matches no module; {_nearest(single, list(named))}",
                parameter=argument,
            )
        chosen |= found
    return {name: module for name, module in named.items() if name in chosen}


def by_entry(
    model: nn.Module, layers: Mapping[str, nn.Module], entries: float | Mapping[str, float], argument: str
) -> list[tuple[float, list[str]]]:
    """Return the numbers of a mapping by selector, each with the names of the layers whose first match it is.

    Args:
        model: the model.
        layers: some of its modules, by name.
        entries: ``{selector: number}`` with string selectors, or one number for all layers.
        argument: the user's name for the mapping, for the error.

    Raises:
        ValueError: a selector matches nothing, or a layer has no entry.
    """
    if not isinstance(entries, Mapping):
        return [(entries, list(layers))]
    for pattern in entries:
        select(model, pattern, argument)
    names: dict[str, list[str]] = {}
    for name, layer in layers.items():
        first = next((pattern for pattern in entries if matches(pattern, layer, name)), None)
        if first is None:
            raise InputError(
                f"{argument} has no entry that matches {name!r}; add one, or a last entry '*': <value>",
                parameter=argument,
            )
        names.setdefault(first, []).append(name)
    return [(entries[pattern], those) for pattern, those in names.items()]


def _nearest(single: Any, names: list[str]) -> str:
    if not names:
        return "the model has no children"
    wanted = single.removeprefix("re:") if isinstance(single, str) else ""
    near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.3) or names[:3]
    return f"nearest names: {', '.join(near)}"
