"""What AGENT accepts: the ranges of its options, and parts that belong together."""

from __future__ import annotations

import torch
from torch import nn

from sparsekern.errors import InputError
from sparsekern.nn import refuse_sharded, sparse_layers
from sparsekern.topology.arguments import check_number, check_whole
from sparsekern.training.base import Method
from sparsekern.training.passes import parallel_modules

ESTIMATES = ("losses", "gradients")
SCOPES = ("global", "layer")

NOT_SHARDED = "AGENT keeps whole copies of the values, and sharded ones are not supported; use DDP"


def check_options(
    gamma: float, alpha: float, estimate: str, scope: str, batches: int | None, every: int | None
) -> None:
    """Raise ValueError if an option of :class:`~sparsekern.training.AGENT` is out of range, or two disagree."""
    for name, number in (("gamma", gamma), ("alpha", alpha)):
        check_number(name, number, "a number")
    if not 0 <= gamma <= 1:
        raise InputError(f"gamma is {gamma}; it must be in [0, 1]", parameter="gamma")
    if not 0 < alpha <= 1:
        raise InputError(f"alpha is {alpha}; it must be in (0, 1]", parameter="alpha")
    for name, choice, known in (("estimate", estimate, ESTIMATES), ("scope", scope, SCOPES)):
        if choice not in known:
            raise InputError(f"{name} is {choice!r}; it must be one of {', '.join(known)}", parameter=name)
    for name, value in (("batches", batches), ("every", every)):
        if value is not None and check_whole(name, value) < 1:
            raise InputError(f"{name} is {value}; it must be 1 or more", parameter=name)
    if estimate == "losses" and (scope == "layer" or every is not None):
        name, what = ("scope", "'layer'") if scope == "layer" else ("every", str(every))
        raise InputError(
            f"{name} is {what}, but the losses of batches give one c after a pass; estimate must be gradients",
            parameter=name,
        )


def check_parallel(model: nn.Module) -> None:
    """Raise NotImplementedError if DistributedDataParallel, which the model is or holds, takes all backwards for alike.

    Its ``no_sync``, in which AGENT makes its own, then ends in an assertion of PyTorch.
    """
    if any(module.static_graph for module in parallel_modules(model)):
        raise NotImplementedError(
            "the model is in DistributedDataParallel(static_graph=True), which reduces every backward over ranks, and "
            "AGENT makes some that must not be; leave static_graph out"
        )


def check_parts(model: nn.Module, optimizer: torch.optim.Optimizer, method: Method | None) -> None:
    """Raise an error if model, optimizer and method do not belong together.

    Raises:
        TypeError: one is of another kind.
        ValueError: the method is of another model or optimizer.
        RuntimeError: the method is closed.
        NotImplementedError: the values are sharded.
    """
    layers = sparse_layers(model)
    refuse_sharded(layers, NOT_SHARDED)
    if method is None:
        return
    if not isinstance(method, Method):
        raise TypeError(f"method is a {type(method).__name__}; it must be a sparsekern.Method, or None")
    method.check_open()
    if method.optimizer is not optimizer or {*map(id, layers.values())} != {*map(id, method.layers.values())}:
        raise InputError("method is of another model or optimizer; build both of the same two", parameter="method")
