"""An optimizer goes on when a parameter is exchanged for another form of itself: dense for blocks, or back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.errors import InputError
from sparsekern.topology import Topology, gather_blocks, to_dense
from sparsekern.topology.arguments import check_kind

Exchanges = Mapping[str, tuple[nn.Parameter, nn.Parameter, Topology]]
"""By the name of the layer: the parameter that leaves, the one that comes, and the places of the blocks."""


def check_optimizer(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
    """Check that an optimizer can go on with other forms of its parameters; nothing changes.

    Args:
        optimizer: the one in use.
        parameters: those that are to leave, by the name of their layer.

    Raises:
        TypeError: it is no optimizer.
        ValueError: it lacks a parameter that trains, or keeps a state that is not one entry a weight.
    """
    check_kind("optimizer", optimizer, torch.optim.Optimizer, "a torch.optim.Optimizer, or None")
    kind = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):
        raise InputError(
            "LBFGS keeps flat vectors over all parameters, not one entry a weight; build a new optimizer instead",
            parameter="optimizer",
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in parameters.items():
        if id(parameter) not in held:
            if parameter.requires_grad:
                raise InputError(
                    f"the weight of {name!r} is not in this optimizer; give the one that was built from the model's "
                    "parameters",
                    parameter="optimizer",
                )
            continue
        for key, value in optimizer.state.get(parameter, {}).items():
            if not (isinstance(value, Tensor) and value.numel() > 1) or value.shape == parameter.shape:
                continue
            raise InputError(
                f"{kind} keeps {key!r} of shape {tuple(value.shape)} for the weight of {name!r}, not one entry a "
                "weight; build a new optimizer instead",
                parameter="optimizer",
            )


@torch.no_grad()
def exchange_(optimizer: torch.optim.Optimizer, exchanges: Exchanges) -> None:
    """Put parameters in the places of others, in their groups, with the state of the blocks that both have.

    Entries that only the dense form has begin as an untouched weight's do. :func:`check_optimizer` must have passed.
    """
    new_of = {id(old): new for old, new, _ in exchanges.values()}
    for old, new, topology in exchanges.values():
        group = param_group(optimizer, old)
        if group is None or old not in optimizer.state:
            continue
        old_state = optimizer.state.pop(old)
        optimizer.state[new] = {
            key: _converted(value, old, new, topology, initial_entry(optimizer, key, group))
            if isinstance(value, Tensor) and value.shape == old.shape
            else value
            for key, value in old_state.items()
        }
    for group in optimizer.param_groups:
        group["params"][:] = [new_of.get(id(p), p) for p in group["params"]]


def _converted(state: Tensor, old: Tensor, new: Tensor, topology: Topology, fresh: float) -> Tensor:
    if new.shape == topology.grid.weight_shape:
        dense = to_dense(topology, state)
        if fresh:
            dense[to_dense(topology, torch.ones_like(state)) == 0] = fresh
        return dense
    return gather_blocks(topology, state)


def param_group(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any] | None:
    """Return the parameter group of the optimizer that holds this parameter, or None."""
    return next((group for group in optimizer.param_groups if any(p is parameter for p in group["params"])), None)


def initial_entry(optimizer: torch.optim.Optimizer, key: str, group: dict[str, Any]) -> float:
    """Return what an entry of a state holds before the first step in PyTorch's optimizers: zero in all but two."""
    if isinstance(optimizer, torch.optim.Adagrad) and key == "sum":
        return float(group.get("initial_accumulator_value", 0.0))
    if isinstance(optimizer, torch.optim.Rprop) and key == "step_size":
        return float(group["lr"])
    return 0.0
