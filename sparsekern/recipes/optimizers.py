"""The optimizers of the recipes: settings that are plain values, and what PyTorch makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

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
