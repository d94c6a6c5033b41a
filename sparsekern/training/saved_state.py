"""Checks of a method's saved state, made before anything of it is loaded."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparsekern.errors import InputError
from sparsekern.topology.arguments import check_kind

STATE_VERSION = 2
"""Version of the state of a method."""

FREE = ("start",)
"""Entries whose tensors may be of any length: with a global scope the numbers of blocks change."""

OPTIONAL: dict[str, tuple[Any, str]] = {
    "stage": (int, "a whole number"),
    "averaged": (int, "a whole number"),
    "before": (tuple, "a tuple"),
}
"""Entries that may be None, their type otherwise, and its name in words."""

LARGEST = 2**62
"""Bound of counts."""


def check_state_of_method(method: Any, state: Any) -> None:
    """Check a state that a method is to load, completely.

    Raises:
        ValueError: it is damaged, or of another method, version or model.
        TypeError: it is not a dictionary.
    """
    check_kind("state", state, dict, "what state_dict() returned")
    version, kind = state.get("version"), type(method).__name__
    if type(version) is not int or version != STATE_VERSION:
        raise InputError(f"the state has version {version}; this code reads {STATE_VERSION}")
    if missing := method.state_dict().keys() - state.keys():
        raise InputError(f"the state lacks {', '.join(sorted(missing))}; it is not one that state_dict() returned")
    if not isinstance(state["method"], str) or state["method"] != kind:
        raise InputError(f"the state is of {state['method']}; this is {kind}")
    if isinstance(start := state["start"], dict) and start.keys() != method.layers.keys():
        raise InputError(f"the state is of layers {', '.join(start)}; the model has {', '.join(method.layers)}")
    package = __name__.partition(".")[0]
    known: Any = next(kind for kind in type(method).__mro__ if kind.__module__.partition(".")[0] == package)
    own = known.state_dict(method)  # a user's subclass checks its own entries
    check_like({name: state[name] for name in own}, own)


def check_like(saved: Any, own: Any, where: str = "state", *, free: bool = False) -> None:
    """Check that a saved state has the same names, types, shapes and dtypes as the present one.

    Entries that differ between two states of one object are in tuples, whose elements the loader checks, or may be
    None.

    Args:
        saved: the state to be loaded.
        own: the present ``state_dict()``.
        where: the name of the entry in errors.
        free: whether the lengths of tensors may differ.

    Raises:
        ValueError: an entry is missing, of another type, shape or dtype, negative, or not finite.
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
