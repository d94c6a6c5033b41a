"""The part of an optimizer's state that belongs to slots, whichever optimizer it is."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsekern.kernels.contract import accumulate_dtype

SECOND_MOMENTS = (
    *("exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "sum", "v"),
    *("row_var", "col_var", "variance"),  # Adafactor
)
"""Names under which optimizers keep the size of past gradients, for ``grown_state="mean_v"``."""


class SlotState(NamedTuple):
    """One state tensor whose first axis is the slots, and the value of a slot that has never been stepped."""

    key: str
    tensor: Tensor
    fresh: float


def param_group(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any] | None:
    """Return the group of the optimizer that holds this very parameter, or None."""
    for group in optimizer.param_groups:
        if any(p is parameter for p in group["params"]):
            return group
    return None


def slot_state(optimizer: torch.optim.Optimizer, parameter: Tensor, name: str) -> list[SlotState]:
    """Return the state tensors that must be reset where a block moves.

    A state is matched by its axes, not its shape: Adafactor's are ``(Z, bo, 1)``. Numbers and 0-dimensional tensors,
    such as step counters, belong to the whole parameter and stay.

    Args:
        optimizer: any :class:`torch.optim.Optimizer`.
        parameter: ``values (Z, ...)`` of a layer.
        name: the layer's name, for the error.

    Raises:
        ValueError: the parameter is not in the optimizer, or a state cannot be split by slots.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "LBFGS keeps flat vectors over all parameters, which cannot follow moving blocks; use an optimizer with "
            "one state entry a weight, such as SGD or AdamW"
        )
    inner = next((key for key, part in vars(optimizer).items() if _holds_optimizer(part)), None)
    if inner is not None:
        raise ValueError(
            f"{type(optimizer).__name__} keeps its state in another optimizer ({inner!r}), where it would not follow "
            "moving blocks; use a plain optimizer"
        )
    group = param_group(optimizer, parameter)
    if group is None:
        raise ValueError(
            f"values of {name!r} are not in this optimizer. Build it after sparsify_, from model.parameters(); a model "
            "whose sparse layers are spread over several optimizers is not supported"
        )
    found = []
    for key, state in optimizer.state.get(parameter, {}).items():
        if state is None or isinstance(state, (int, float, bool, str)):
            continue
        if isinstance(state, Tensor) and state.dim() == 0:
            continue
        if isinstance(state, Tensor) and _is_by_slot(state, parameter):
            found.append(SlotState(key, state, fresh_value(optimizer, key, group)))
            continue
        what = f"of shape {tuple(state.shape)}" if isinstance(state, Tensor) else f"a {type(state).__name__}"
        raise ValueError(
            f"{type(optimizer).__name__} keeps {key!r} for values of {name!r}, {what}, which has no axis of "
            f"{parameter.shape[0]} slots: moving blocks would leave it wrong. Use an optimizer with one state entry a "
            "weight, such as SGD or AdamW"
        )
    return found


def _holds_optimizer(part: Any) -> bool:
    """Return whether a part of an optimizer is itself an optimizer, or a collection of them."""
    parts = part.values() if isinstance(part, dict) else part if isinstance(part, (list, tuple)) else (part,)
    return any(isinstance(p, torch.optim.Optimizer) for p in parts)


def _is_by_slot(state: Tensor, parameter: Tensor) -> bool:
    """Return whether a state is one number a slot, or has the parameter's axes, some of them reduced to 1."""
    if state.shape[0] != parameter.shape[0]:
        return False
    later = zip(state.shape[1:], parameter.shape[1:], strict=False)
    return state.dim() == 1 or (state.dim() == parameter.dim() and all(s in (1, p) for s, p in later))


def fresh_value(optimizer: torch.optim.Optimizer, key: str, group: dict[str, Any]) -> float:
    """Return what an untouched entry holds; zero in all but two optimizers."""
    if isinstance(optimizer, torch.optim.Adagrad) and key == "sum":
        return float(group.get("initial_accumulator_value", 0.0))
    if isinstance(optimizer, torch.optim.Rprop) and key == "step_size":
        return float(group["lr"])
    return 0.0


def mean_of_kept(state: Tensor, kept: Tensor, real: Tensor | None) -> Tensor:
    """Return the mean ``()`` of a state over the blocks that stay, phantom elements not counted.

    Args:
        state: ``(Z, ...)``.
        kept: ``(Z,)`` bool, slots whose blocks stay.
        real: mask of real elements, or None if all are; ignored when the state is not one entry a weight.
    """
    weight = kept.view(-1, *[1] * (state.dim() - 1)).expand_as(state)
    if real is not None and state.shape[1:] == real.shape[1:]:
        weight = weight & real
    total = torch.where(weight, state, 0).sum(dtype=accumulate_dtype(state.dtype))  # float16 would overflow
    return (total / weight.sum().clamp(min=1)).to(state.dtype)
