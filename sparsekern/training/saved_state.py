"""Checks of a method's saved state, made before anything of it is loaded."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparsekern.errors import InputError

FREE = ("start",)
"""Entries whose tensors may be of any length: a run with a global scope began with other numbers of blocks."""

OPTIONAL: dict[str, tuple[Any, str]] = {
    "stage": (int, "a whole number"),
    "averaged": (int, "a whole number"),
    "before": (tuple, "a tuple"),
}
"""Entries that come and go in the course of a run, and what they are while they are not None."""

LARGEST = 2**62
"""Of a number that counts something."""


def check_state_of(owner: Any, saved: dict[str, Any]) -> None:
    """Check what classes of this package wrote into a state; the entries of a user's subclass are its own to check.

    Args:
        owner: has a ``state_dict()``.
        saved: a state with all the names of it.

    Raises:
        ValueError: as :func:`check_like`.
    """
    package = __name__.partition(".")[0]
    known: Any = next(kind for kind in type(owner).__mro__ if kind.__module__.partition(".")[0] == package)
    own = known.state_dict(owner)
    check_like({name: saved[name] for name in own}, own)


def check_like(saved: Any, own: Any, where: str = "state", *, free: bool = False) -> None:
    """Check that a saved state is like the one that the same object has now: names, kinds, shapes and dtypes.

    What varies between two states of one object is in tuples, whose entries whoever loads them checks, or is None at
    times: neither the object nor the state need be in the middle of a step.

    Args:
        saved: what is to be loaded.
        own: what ``state_dict()`` returns now.
        where: the entry, for the error.
        free: whether the lengths of tensors may differ.

    Raises:
        ValueError: an entry is missing, of another kind, shape or dtype, negative, or not finite.
    """
    if isinstance(own, dict):
        if not isinstance(saved, dict) or saved.keys() != own.keys():
            names = ", ".join(str(name) for name in own) or "no entry"
            raise InputError(f"{where} must be a dictionary of {names}; it is not one that state_dict() returned")
        for name, value in own.items():
            if name in OPTIONAL:
                _check_optional(saved[name], name, f"{where}[{name!r}]")
                continue
            check_like(saved[name], value, f"{where}[{name!r}]", free=free or name in FREE)
    elif isinstance(own, Tensor):
        _check_tensor(saved, own, where, free=free)
    elif isinstance(own, tuple):
        if not isinstance(saved, tuple) or len(saved) != len(own) or list(map(type, saved)) != list(map(type, own)):
            raise InputError(f"{where} must be a tuple of {len(own)}; it is not one that state_dict() returned")
    elif isinstance(own, (bool, str)):
        if type(saved) is not type(own):
            raise InputError(f"{where} is {saved!r}; it must be a {type(own).__name__}")
    elif own is None:
        if saved is not None:
            raise InputError(f"{where} is {saved!r}; it must be None")
    else:
        whole = type(own) is int
        if type(saved) is not int and (whole or type(saved) is not float):
            raise InputError(f"{where} is {saved!r}; it must be a {'whole ' * whole}number")
        if not math.isfinite(saved) or (whole and not 0 <= saved < LARGEST):
            raise InputError(f"{where} is {saved!r}; it must be finite, and 0 or more if it counts something")


def _check_optional(saved: Any, name: str, where: str) -> None:
    kind, what = OPTIONAL[name]
    if saved is not None and (type(saved) is not kind or (kind is int and not 0 <= saved < LARGEST)):
        raise InputError(f"{where} is {saved!r}; it must be {what}, or None")


def _check_tensor(saved: Any, own: Tensor, where: str, *, free: bool) -> None:
    if not isinstance(saved, Tensor) or saved.layout != torch.strided or saved.is_meta or saved.dtype != own.dtype:
        raise InputError(f"{where} must be a tensor of {own.dtype}")
    if saved.dim() != own.dim() or saved.shape[free:] != own.shape[free:]:
        raise InputError(f"{where} has shape {tuple(saved.shape)}; it must have {tuple(own.shape)}")
