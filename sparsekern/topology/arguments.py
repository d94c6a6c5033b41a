"""Whether an argument is a number: what Python would else find out three calls deeper."""

from __future__ import annotations

from numbers import Integral, Real


def check_whole(name: str, value: object) -> None:
    """Raise TypeError unless ``value``, of the argument ``name``, is a whole number; numpy's are, True is not."""
    if type(value) is bool or not isinstance(value, Integral):
        raise TypeError(f"{name} is {value!r}; it must be a whole number")


def check_number(name: str, value: object, rule: str) -> None:
    """Raise TypeError unless ``value``, of the argument ``name``, is a real number; ``rule`` says what it must be."""
    if not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r}; it must be {rule}")
