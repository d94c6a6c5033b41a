"""The optimizers of the recipes: settings that are plain values, and what PyTorch makes of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.errors import InputError

# fused: on a CPU the default forms are slow, most of all for the dense twin, and would flatter the sparse network


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent with momentum.

    Attributes:
        weight_decay: added to the gradient as ``weight_decay * parameter``.
        momentum: factor of the running sum of gradients.
        nesterov: whether to look one step ahead.
        decay_all: whether norms and biases decay too.
    """

    weight_decay: float
    momentum: float = 0.9
    nesterov: bool = False
    decay_all: bool = True

    def build(self, model: nn.Module, rate: float) -> torch.optim.Optimizer:
        """Return the optimizer of a model's parameters."""
        groups = parameter_groups(model, self.weight_decay, decay_all=self.decay_all)
        return torch.optim.SGD(groups, lr=rate, momentum=self.momentum, nesterov=self.nesterov, fused=True)


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay: a step takes ``rate * weight_decay * parameter`` away.

    Attributes:
        weight_decay: see above.
        decay_all: whether norms and biases decay too.
    """

    weight_decay: float = 0.01
    decay_all: bool = True

    def build(self, model: nn.Module, rate: float) -> torch.optim.Optimizer:
        """Return the optimizer of a model's parameters."""
        groups = parameter_groups(model, self.weight_decay, decay_all=self.decay_all)
        return torch.optim.AdamW(groups, lr=rate, fused=True)


def parameter_groups(model: nn.Module, weight_decay: float, *, decay_all: bool) -> list[dict[str, Any]]:
    """Return the groups for an optimizer: one, or one of weights that decay and one of norms and biases that do not.

    Norms and biases are what has one axis; the ``values`` of a sparse layer have three, also in blocks of 1x1.
    """
    parameters = list(model.parameters())
    if decay_all:
        return [{"params": parameters, "weight_decay": weight_decay}]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the state of an optimizer that was built as this one, every tensor checked before the optimizer gets it.

    Fused optimizers take the sizes of a state on trust: too small a one makes them write beyond its end.

    Raises:
        ValueError: options other than these, but for the rate, or an entry of another shape or dtype.
    """
    groups = optimizer.state_dict()["param_groups"]
    if not _same_groups(state.get("param_groups"), groups) or not isinstance(state.get("state"), dict):
        raise InputError("the optimizer's options or parameters are not those of this run")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    kept = _entries(optimizer)
    checked: dict[int, dict[str, Tensor]] = {}
    for number, entries in state["state"].items():
        if type(number) is not int or not 0 <= number < len(parameters) or not isinstance(entries, dict):
            raise InputError(f"the optimizer's state names parameter {number!r} of {len(parameters)}")
        if entries.keys() != kept.keys():
            raise InputError(f"the optimizer's state of parameter {number} has other entries than {', '.join(kept)}")
        checked[number] = {
            key: _fitting(entries[key], f"{key} of parameter {number}", parameters[number], kept[key]) for key in kept
        }
    optimizer.load_state_dict({"state": checked, "param_groups": state["param_groups"]})


def _same_groups(given: Any, wanted: list[dict[str, Any]]) -> bool:
    """Return whether groups are those wanted but for the rate, which every step sets, as a number of the same kind."""
    if not isinstance(given, list) or not all(isinstance(group, dict) for group in given):
        return False
    if not all(type(group.get("lr")) is float and 0 <= group["lr"] < math.inf for group in given):
        return False
    return repr([group | {"lr": 0} for group in given]) == repr([group | {"lr": 0} for group in wanted])


def _entries(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return what an optimizer keeps for a parameter of two elements once it has stepped, by name."""
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.zeros(2)
    taken = signature(type(optimizer)).parameters
    twin = type(optimizer)([parameter], **{name: v for name, v in optimizer.defaults.items() if name in taken})
    twin.step()
    return dict(twin.state[parameter])


def _fitting(value: Any, name: str, parameter: Tensor, like: Tensor) -> Tensor:
    """Return a copy of a state's tensor in the memory format of its parameter, or alone if it is a number."""
    shape = parameter.shape if like.dim() else like.shape
    dtype = parameter.dtype if like.dim() else like.dtype
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.shape != shape or value.dtype != dtype:
        raise InputError(f"the optimizer's {name} must be {dtype} of shape {tuple(shape)}")
    if not like.dim():
        return value.clone()
    return torch.empty_like(parameter, requires_grad=False).copy_(value)
