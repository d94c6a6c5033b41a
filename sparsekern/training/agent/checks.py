"""Checks of the arguments of AGENT."""

from __future__ import annotations

import torch
from torch import nn

from sparsekern.errors import InputError
from sparsekern.nn import sparse_layers
from sparsekern.topology.arguments import check_choice, check_number, check_whole
from sparsekern.training.base import Method
from sparsekern.training.passes import parallel_modules

ESTIMATES = ("losses", "gradients")
SCOPES = ("global", "layer")


def check_options(
    gamma: float, alpha: float, estimate: str, scope: str, batches: int | None, every: int | None
) -> None:
    """Raise ValueError if an option is out of range, or two options contradict each other."""
    for name, number in (("gamma", gamma), ("alpha", alpha)):
        check_number(name, number, "a number")
    if not 0 <= gamma <= 1:
        raise InputError(f"gamma is {gamma}; it must be in [0, 1]", parameter="gamma")
    if not 0 < alpha <= 1:
        raise InputError(f"alpha is {alpha}; it must be in (0, 1]", parameter="alpha")
    for name, choice, known in (("estimate", estimate, ESTIMATES), ("scope", scope, SCOPES)):
        check_choice(name, choice, known)
    for name, value in (("batches", batches), ("every", every)):
        if value is not None:
            check_whole(name, value, 1)
    if estimate == "losses" and (scope == "layer" or every is not None):
        name, what = ("scope", "'layer'") if scope == "layer" else ("every", str(every))
        raise InputError(
            f"{name} is {what}, but the losses of batches give one c after a pass; estimate must be gradients",
            parameter=name,
        )


def check_parts(model: nn.Module, optimizer: torch.optim.Optimizer, method: Method | None, gamma: float) -> None:
    """Raise an error if model, optimizer and method do not belong together, or gradients cannot be corrected."""
    layers = sparse_layers(model)
    if gamma > 0 and any(module.static_graph for module in parallel_modules(model)):  # no_sync fails an assertion
        raise NotImplementedError(
            "the model is in DistributedDataParallel(static_graph=True), which reduces every backward over ranks, and "
            "AGENT makes some that must not be; leave static_graph out"
        )
    if method is None:
        return
    if not isinstance(method, Method):
        raise TypeError(f"method is a {type(method).__name__}; it must be a sparsekern.Method, or None")
    method.check_open()
    if method.optimizer is not optimizer or {*map(id, layers.values())} != {*map(id, method.layers.values())}:
        raise InputError("method is of another model or optimizer; build both of the same two", parameter="method")
