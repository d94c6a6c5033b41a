"""Initial values of transformed layers.

``"variance"``: the output of a layer varies as that of the dense layer it replaces, whose own weight says how much. The
stored inputs of an output count, not all: values drawn for the full width and then masked would leave ``1 - s`` of the
variance, which batch norm hides and residual networks with layer norm do not.

``"paper"``: what the paper's code does: Kaiming's normal distribution for the outputs of the full shape, then masked.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from sparsekern.errors import InputError
from sparsekern.nn import BlockSparse
from sparsekern.nn.init import fan_in
from sparsekern.topology import generator_for

INITS = ("variance", "paper")

GRID = 4001
"""Points of the integral over a normal distribution."""


def check_init(init: str) -> None:
    """Raise ValueError unless ``init`` is one of :data:`INITS`."""
    if init not in INITS:
        raise InputError(f"init is {init!r}; it must be one of {', '.join(INITS)}", parameter="init")


def output_variance(layer: nn.Linear | nn.Conv2d) -> float:
    """Return the variance of a dense layer's output, without bias, for independent inputs of mean square 1."""
    weight = layer.weight.detach()
    return float(weight[0].numel() * weight.double().square().mean())


def moments(activation: nn.Module, variance: float) -> tuple[float, float]:
    """Return the mean square and the variance of an activation of a normal number of mean 0."""
    x = torch.linspace(-8, 8, GRID, dtype=torch.float64, device="cpu")
    density = torch.exp(-x.square() / 2)
    density /= density.sum()
    activation = copy.deepcopy(activation).to("cpu", torch.float64)  # it may have parameters
    with torch.no_grad():
        y = activation(math.sqrt(variance) * x)
    mean, square = float((density * y).sum()), float((density * y.square()).sum())
    return square, square - mean**2


def variance_before(activation: nn.Module, wanted: float) -> float:
    """Return the variance of a normal number of mean 0 whose activation has the variance ``wanted``.

    Where an activation saturates below it, the answer is very large.
    """
    low, high = 1e-12, 1e12
    for _ in range(100):  # halves the ratio's logarithm: far below the precision of the integral
        middle = math.sqrt(low * high)
        low, high = (middle, high) if moments(activation, middle)[1] < wanted else (low, middle)
    return math.sqrt(low * high)


def wanted_variance(layer: nn.Linear | nn.Conv2d, init: str) -> float | None:
    """Return what the output of a dense layer's replacement is to vary by; None where it is drawn as the paper does."""
    return output_variance(layer) if init == "variance" else None


@torch.no_grad()
def draw_(layer: BlockSparse, variance: float | None) -> None:
    """Draw normal values.

    Args:
        layer: whose stored blocks are drawn.
        variance: of its outputs, bias not counted, for inputs of mean square 1. None: Kaiming's values as in the
            paper, ``2 / fan_out`` of the full shape.
    """
    if variance is None:
        fan_out = layer.grid.out_features * layer.grid.taps
        std = torch.tensor(math.sqrt(2 / fan_out), dtype=torch.float64, device="cpu")
    else:
        inputs = fan_in(layer.topology).clamp(min=1).double()
        std = (variance / inputs).sqrt()[layer.row.clamp(min=0).long()].view(-1, 1, 1)
    generator = generator_for(layer.seed, layer.name, "values")
    drawn = torch.randn(layer.values.shape, generator=generator, dtype=torch.float64, device="cpu")
    drawn *= std.to(drawn.device)
    real = layer.topology.real()
    layer.values.copy_(drawn if real is None else drawn.masked_fill_(~real.to(drawn.device), 0))


@torch.no_grad()
def draw_dense_(layer: nn.Linear | nn.Conv2d, variance: float | None, seed: int, name: str) -> None:
    """Draw a dense layer's weight by the rule of the sparse ones: for that variance, or (None) as the paper."""
    weight = layer.weight
    fan = weight[0].numel() if variance is not None else weight.shape[0] * weight[0, 0].numel()
    std = math.sqrt((2.0 if variance is None else variance) / fan)
    drawn = torch.randn(weight.shape, generator=generator_for(seed, name, "values"), dtype=torch.float64, device="cpu")
    weight.copy_(drawn * std)


@torch.no_grad()
def draw_bias_(layer: BlockSparse, dense: nn.Linear | nn.Conv2d) -> None:
    """Copy the dense layer's bias, or, where the sparse one has more outputs, draw it as large: uniform."""
    if layer.bias is None or dense.bias is None:
        return
    if layer.bias.shape == dense.bias.shape:
        layer.bias.copy_(dense.bias)
        return
    bound = math.sqrt(3) * float(dense.bias.double().square().mean().sqrt())
    generator = generator_for(layer.seed, layer.name, "bias")
    drawn = torch.rand(layer.bias.shape, generator=generator, dtype=torch.float64, device="cpu")
    layer.bias.copy_((2 * drawn - 1) * bound)
