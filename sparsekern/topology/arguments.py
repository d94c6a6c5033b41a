"""Whether an argument is a number: what Python would else find out three calls deeper."""

from __future__ import annotations

import operator
from numbers import Real
from typing import Any


def check_whole(name: str, value: Any) -> None:
    """Raise TypeError unless ``value``, of the argument ``name``, is a whole number.

    Those of numpy and tensors of one integer are; True is not.
    """
    try:
        operator.index(value)
    except TypeError:
        whole = False
    else:
        whole = type(value) is not bool
    if not whole:
        raise TypeError(f"{name} is {value!r}; it must be a whole number")


def check_number(name: str, value: object, rule: str) -> None:
    """Raise TypeError unless ``value``, of the argument ``name``, is a real number; ``rule`` says what it must be."""
    if not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r}; it must be {rule}")
