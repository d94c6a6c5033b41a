"""Checks of arguments, so that errors name the argument and appear where the user called."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Collection
from numbers import Real
from typing import Any

import torch

from sparsekern.errors import InputError


def check_whole(name: str, value: Any, least: int | None = None, unit: str = "") -> int:
    """Return the value of the argument ``name`` as an int.

    Args:
        name: of the argument.
        value: a whole number. NumPy integers and integer tensors of one element are whole numbers; True is not.
        least: the lowest number allowed; None for no limit.
        unit: follows the limit in the message.

    Raises:
        TypeError: it is not a whole number.
        ValueError: it is below ``least``.
    """
    whole: int | None = None
    if not isinstance(value, bool) and getattr(value, "dtype", None) is not torch.bool:
        with contextlib.suppress(TypeError, RuntimeError):  # a tensor without data raises RuntimeError
            whole = operator.index(value)
    if whole is None:
        raise TypeError(f"{name} is {value!r}; it must be a whole number")
    if least is not None and whole < least:
        raise InputError(f"{name} is {whole}; it must be {least} or more{unit}", parameter=name)
    return whole


def check_choice(name: str, value: object, known: Collection[str], or_else: str = "") -> None:
    """Raise ValueError unless the value of the argument ``name`` is one of the known names."""
    if not isinstance(value, str) or value not in known:
        raise InputError(f"{name} is {value!r}; it must be one of {', '.join(known)}{or_else}", parameter=name)


def whole_sides(name: str, value: Any, count: int, rule: str) -> tuple[int, ...]:
    """Return the value of the argument ``name`` as ``count`` ints; a single whole number is repeated.

    Raises:
        TypeError: it is neither a whole number nor a tuple or list of ``count``; ``rule`` says so in the message.
    """
    try:
        sides = value if isinstance(value, (tuple, list)) else [value] * count
        whole = tuple(check_whole(name, side) for side in sides)
    except TypeError:
        whole = ()
    if len(whole) != count:
        raise TypeError(f"{name} is {value!r}; it must be {rule}")
    return whole


def check_kind(name: str, value: object, kind: type | tuple[type, ...], rule: str) -> None:
    """Raise TypeError unless the value of the argument ``name`` is of a class; ``rule`` says so in the message."""
    if not isinstance(value, kind):
        what = "None" if value is None else f"a {type(value).__name__}"
        raise TypeError(f"{name} is {what}; it must be {rule}")


def check_number(name: str, value: Any, rule: str, allowed: Callable[[Any], bool] = lambda number: True) -> None:
    """Check that the value of the argument ``name`` is a real number for which ``allowed`` holds.

    Raises:
        TypeError: it is no real number; ``rule`` says in the message what it must be.
        ValueError: it is another number.
    """
    if not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r}; it must be {rule}")
    if not allowed(value):
        raise InputError(f"{name} is {value}; it must be {rule}", parameter=name)
