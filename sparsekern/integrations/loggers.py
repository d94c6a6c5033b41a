"""Logging of numbers during a training: to TensorBoard, or to any object that logs a dict."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TypeAlias

from sparsekern.errors import InputError

LogTo: TypeAlias = Any
"""A folder for TensorBoard, a ``SummaryWriter``, or an object with ``log(dict)`` such as a run of Weights & Biases."""


def open_log(target: LogTo) -> Any:
    """Return what :func:`log` takes for a target: a writer for a folder, other objects as they are.

    Raises:
        TypeError: the target is none of what is known.
        ValueError: it is a folder, and TensorBoard is not installed.
    """
    if isinstance(target, (str, os.PathLike)):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise InputError(
                "log_to is a folder, which TensorBoard writes, and that is not installed: pip install tensorboard",
                parameter="log_to",
            ) from None
        return SummaryWriter(os.fspath(target))
    if target is not None and not callable(getattr(target, "add_scalar", getattr(target, "log", None))):
        raise TypeError(
            f"log_to is a {type(target).__name__}; it must be a folder for TensorBoard, a SummaryWriter, or an object "
            "with log(dict)"
        )
    return target


def log(target: Any, numbers: Mapping[str, float], step: int) -> None:
    """Log numbers of one step. An object with ``log(dict)`` is handed ``step`` among them."""
    if hasattr(target, "add_scalar"):
        for name, number in numbers.items():
            target.add_scalar(name, number, step)
        target.flush()
    elif target is not None:
        target.log({**numbers, "step": step})
