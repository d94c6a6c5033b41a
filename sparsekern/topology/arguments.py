"""Checks of the types of arguments, so that errors name the argument and appear where the user called."""

from __future__ import annotations

import contextlib
import operator
from numbers import Real
from typing import Any

import torch


def check_whole(name: str, value: Any) -> int:
    """Return the value of the argument ``name`` as an int; raise TypeError unless it is a whole number.

    NumPy integers and integer tensors of one element are whole numbers; True is not.
    """
    if not isinstance(value, bool) and getattr(value, "dtype", None) is not torch.bool:
        with contextlib.suppress(TypeError, RuntimeError):  # a tensor without data raises RuntimeError
            return operator.index(value)
    raise TypeError(f"{name} is {value!r}; it must be a whole number")


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


def check_number(name: str, value: object, rule: str) -> None:
    """Raise TypeError unless the value of the argument ``name`` is a real number; ``rule`` says so in the message."""
    if not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r}; it must be {rule}")
