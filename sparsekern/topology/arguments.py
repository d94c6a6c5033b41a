"""Whether an argument is a number, or of its class: what Python would else find out three calls deeper."""

from __future__ import annotations

import contextlib
import operator
from numbers import Real
from typing import Any

import torch


def check_whole(name: str, value: Any) -> int:
    """Return ``value``, of the argument ``name``, as Python's int; raise TypeError unless it is a whole number.

    Integers of numpy and tensors of one integer are whole numbers; True is not.
    """
    if not isinstance(value, bool) and getattr(value, "dtype", None) is not torch.bool:
        with contextlib.suppress(TypeError, RuntimeError):  # a tensor without data raises RuntimeError
            return operator.index(value)
    raise TypeError(f"{name} is {value!r}; it must be a whole number")


def whole_sides(name: str, value: Any, count: int, rule: str) -> tuple[int, ...]:
    """Return ``value``, of the argument ``name``, as ``count`` of Python's ints; one whole number counts for all.

    Raises:
        TypeError: neither a whole number nor a tuple or list of ``count``; ``rule`` says what it must be.
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
    """Raise TypeError unless ``value``, of the argument ``name``, is of a class; ``rule`` says what it must be."""
    if not isinstance(value, kind):
        what = "None" if value is None else f"a {type(value).__name__}"
        raise TypeError(f"{name} is {what}; it must be {rule}")


def check_number(name: str, value: object, rule: str) -> None:
    """Raise TypeError unless ``value``, of the argument ``name``, is a real number; ``rule`` says what it must be."""
    if not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r}; it must be {rule}")
