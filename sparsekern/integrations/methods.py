"""Training methods for the loops of other libraries: built from a name or a function; their numbers, and loggers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import nn

from sparsekern.errors import InputError
from sparsekern.topology.arguments import check_choice
from sparsekern.training import AGENT, METHODS, Method, NetworkSampler

AnyMethod: TypeAlias = Method | AGENT

Factory: TypeAlias = Callable[[nn.Module, torch.optim.Optimizer], AnyMethod]


class MethodSpec:
    """A training method that is built when the host has made its optimizer.

    Args:
        method: one of :data:`sparsekern.training.METHODS`, such as ``"set"``; or a function of the model and the
            optimizer that returns the method.
        options: arguments of the method of that name. ``stop`` is three quarters of the training if it is not given.

    Raises:
        ValueError: an unknown name, or options beside a function.
        TypeError: ``method`` is neither.
    """

    def __init__(self, method: str | Factory, options: dict[str, Any]) -> None:
        if isinstance(method, str):
            check_choice("method", method, METHODS, ", or a function of the model and the optimizer")
        elif not callable(method):
            raise TypeError(
                f"method is a {type(method).__name__}; it must be the name of a method, or a function of the model and "
                "the optimizer that returns one"
            )
        elif options:
            raise InputError(
                f"{', '.join(options)}: options go with the name of a method; a function passes its own",
                parameter="method",
            )
        self.method, self.options = method, options

    def build(self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> AnyMethod:
        """Return the method for a model and its optimizer.

        Args:
            model: with sparse layers.
            optimizer: may be a launcher's wrapper.
            steps: optimizer steps of the whole training, or 0 if it has no known end.
        """
        if not isinstance(self.method, str):
            built = self.method(model, optimizer)
            if not isinstance(built, (Method, AGENT)):
                raise TypeError(f"the function returned a {type(built).__name__}; it must return a training method")
            return built
        ends = {"stop": 0.75 * steps} if steps > 0 and self.method != "static" else {}
        return METHODS[self.method](model, optimizer, **(ends | self.options))


def needs_closure(method: AnyMethod) -> bool:
    """Return whether a method runs the passes over a batch itself, and so takes the loss as a function."""
    return isinstance(method, (NetworkSampler, AGENT))


def evaluating(method: AnyMethod | None) -> AbstractContextManager[None]:
    """Return a context in which the model is the network that a method would choose now; as it is without one."""
    active = method is not None and not method.closed
    return method.evaluation() if active and isinstance(method, NetworkSampler) else nullcontext()


def numbers(method: AnyMethod, layers: bool = False) -> dict[str, float]:
    """Return a method's metrics, under names that begin with ``sparse/``; with ``layers`` those of each layer too."""
    found = method.metrics()
    kept = {key for key in found if layers or "/" not in key or key.endswith("/global")}
    return {f"sparse/{key}": float(value) for key, value in found.items() if key in kept}


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
