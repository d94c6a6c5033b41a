"""Layers in the likeness of a dense one: their sizes from one sparsity, and their initial values.

Sizes are those of Thangarasa et al., "Sparse-IFT", ICML 2024, section 3. Initial values are drawn in one of two ways.
``"variance"``: the output of a layer has the variance of the output of the dense layer it replaces, as given by that
layer's weight. Only the stored inputs of an output count: values drawn for the full width and then masked would leave
``1 - s`` of the variance, which batch norm hides and residual networks with layer norm do not. ``"paper"``: as in the
paper's code, Kaiming's normal distribution for the full shape, masked.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import nn

from sparsekern.errors import InputError
from sparsekern.nn import BlockSparse, SparseConv2d, SparseLinear
from sparsekern.nn.conv import conv_arguments
from sparsekern.nn.converters import grid_of
from sparsekern.nn.init import fan_in
from sparsekern.topology import Grid, block_pair, check_sparsity, generator_for
from sparsekern.topology.arguments import check_choice, check_number
from sparsekern.topology.draw import DISTRIBUTIONS, fill, share

Dense = nn.Linear | nn.Conv2d

INITS = ("variance", "paper")

GRID = 4001
"""Number of points of the integral over a normal distribution."""

POINTWISE: dict[str, Any] = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1, "padding_mode": "zeros"}

SMALLEST_MULTIPLE = 8
"""Widths and ranks are multiples of at least this number, because odd ones are slow on all hardware."""


@dataclass(frozen=True)
class Width:
    """The width of a network to build: ``width(512)`` returns the features of a layer that has 512 when dense.

    Args:
        multiplier: factor on the number of features, 1 or more.
        multiple: widths are rounded to the nearest multiple of this number, but never below the dense width.
    """

    multiplier: float = 1.0
    multiple: int = 1

    def __call__(self, features: int) -> int:
        """Return the features of a layer that has ``features`` in the dense network."""
        nearest = math.floor(features * self.multiplier / self.multiple + 0.5)
        return self.multiple * max(nearest, -(-features // self.multiple))


def wide_width(sparsity: float, block_size: int | tuple[int, int]) -> Width:
    """Return the width of a Sparse Wide network, ``sqrt(1 / (1 - s))``, in whole blocks."""
    return Width(math.sqrt(1 / (1 - sparsity)), math.lcm(SMALLEST_MULTIPLE, *block_pair(block_size)))


def parallel_branches(sparsity: float) -> int:
    """Return the number of branches of Sparse Parallel, ``1 / (1 - s)`` rounded, halves up."""
    return math.floor(1 / (1 - sparsity) + 0.5)


def factorized_features(inputs: int, outputs: int, sparsity: float, multiple: int) -> int:
    """Return the features between the factors, ``in * out / ((in + out) (1 - s))``, rounded up to a multiple.

    Args:
        inputs: inputs of the first factor; for a convolution, taps times input channels.
        outputs: outputs of the second factor.
        sparsity: sparsity of both factors.
        multiple: side of the blocks.
    """
    features = inputs * outputs / ((inputs + outputs) * (1 - sparsity))
    return multiple * math.ceil(features / multiple - 1e-9)


def doped_rank(inputs: int, outputs: int, sparsity: float) -> int:
    """Return the rank of the dense path of Sparse Doped, ``s * in * out / (in + out)``.

    It is rounded down to a multiple of 8, so that the sparse path keeps its share, and is at least 1.
    """
    rank = math.floor(sparsity * inputs * outputs / (inputs + outputs) + 1e-9)
    return rank // SMALLEST_MULTIPLE * SMALLEST_MULTIPLE or max(1, rank)


def match_blocks(
    grids: Sequence[Grid], tokens: Sequence[int], multiply_adds: float, distribution: str = "uniform"
) -> list[int]:
    """Return the number of blocks of each layer that together come nearest to a number of multiply-adds.

    Each layer is within one block of its share, and the sum within half a block of one layer. Blocks that extend beyond
    the matrix cost the average of their layer.

    Args:
        grids: the grids of the layers.
        tokens: number of tokens of each layer.
        multiply_adds: multiply-adds of all layers together.
        distribution: how they are distributed; see :func:`sparsekern.topology.allocate`.

    Raises:
        ValueError: there are too few for a block in each layer or too many for all layers, or the distribution is
            unknown.
    """
    check_choice("distribution", distribution, DISTRIBUTIONS)
    costs = [count * grid.numel / grid.cells for grid, count in zip(grids, tokens, strict=True)]
    full = [grid.cells * cost for grid, cost in zip(grids, costs, strict=True)]
    if multiply_adds < sum(costs):
        raise InputError(
            f"{multiply_adds:.0f} multiply-adds are left for {len(grids)} sparse layer(s), and one block in each takes "
            f"{sum(costs):.0f}: use smaller blocks or another sparsity"
        )
    if multiply_adds > sum(full) + max(costs) / 2:
        raise InputError(
            f"{multiply_adds:.0f} multiply-adds are to be spent in {len(grids)} sparse layer(s) that take "
            f"{sum(full):.0f} when full: choose a higher sparsity, or fewer candidates (pool)"
        )
    shares = [cost * share(grid, distribution) for grid, cost in zip(grids, costs, strict=True)]
    total = min(float(multiply_adds), sum(full))
    amounts = [work / cost for work, cost in zip(fill(shares, costs, full, total), costs, strict=True)]
    low = [min(grid.cells, int(amount + 1e-9)) for grid, amount in zip(grids, amounts, strict=True)]
    high = [min(grid.cells, n + 1) for grid, n in zip(grids, low, strict=True)]
    blocks = list(low)
    left = multiply_adds - sum(n * cost for n, cost in zip(blocks, costs, strict=True))
    order = sorted(range(len(grids)), key=lambda i: low[i] - amounts[i])  # largest remainders first
    for i in [*order, *sorted(order, key=lambda i: -costs[i])]:  # then whatever brings the sum nearer, large ones first
        for n in (low[i], high[i]):
            rest = left - (n - blocks[i]) * costs[i]
            if abs(rest) < abs(left):
                blocks[i], left = n, rest
    return blocks


def has_twin(module: nn.Module, name: str = "") -> TypeGuard[Dense]:
    """Return whether the transforms apply to the class of a layer. A selector: ``name`` is ignored."""
    return isinstance(module, (nn.Linear, nn.Conv2d))


def check(layer: nn.Module, sparsity: float, pool: float, init: str) -> None:
    """Check the arguments of a transform.

    Raises:
        TypeError: the layer is of another class.
        ValueError: the layer is a grouped convolution, a number is out of range, or ``init`` is unknown.
    """
    check_sparsity(sparsity)
    check_choice("init", init, INITS)
    check_number("pool", pool, "1 or more", lambda factor: 1 <= factor < math.inf)
    if type(layer) not in (nn.Linear, nn.Conv2d):
        raise TypeError(f"layer is a {type(layer).__name__}; it must be an nn.Linear or nn.Conv2d")
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        raise InputError(
            f"layer has groups = {layer.groups}; Sparse-IFT is defined for convolutions of one group: leave it dense",
            parameter="layer",
        )


def features(layer: Dense) -> tuple[int, int]:
    """Return the numbers of input and output features, or channels."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels


def dense_twin(layer: Dense, ins: int, outs: int, *, pointwise: bool = False, bias: bool, device: Any = None) -> Dense:
    """Return a dense layer of the same class with other features.

    Args:
        layer: the layer to imitate.
        ins, outs: numbers of input and output features, or channels.
        pointwise: make a convolution of a single tap.
        bias: whether it has a bias.
        device: its device. Default: that of ``layer``. ``"meta"`` for a layer of which only the sizes are used.
    """
    placed: dict[str, Any] = {"device": layer.weight.device if device is None else device, "dtype": layer.weight.dtype}
    if isinstance(layer, nn.Linear):
        return nn.Linear(ins, outs, bias, **placed)
    arguments = conv_arguments(layer) | (POINTWISE if pointwise else {})
    return nn.Conv2d(**(arguments | {"in_channels": ins, "out_channels": outs, "bias": bias}), **placed)


def norm_of(layer: Dense, features: int) -> nn.Module:
    """Return batch norm for the ``features`` of a convolution, or an identity for a linear layer."""
    if isinstance(layer, nn.Linear):
        return nn.Identity()
    return nn.BatchNorm2d(features, device=layer.weight.device, dtype=layer.weight.dtype)


def sparse_twins(
    layer: Dense,
    twins: dict[str, Dense],
    multiply_adds: float,
    block_size: int | tuple[int, int] | None,
    seed: int,
    name: str,
) -> list[BlockSparse]:
    """Return sparse layers that together take a number of multiply-adds for each token.

    Args:
        layer: the layer that they replace, which gives the device, the dtype and ``requires_grad``.
        twins: dense layers of their sizes, by the name of the part.
        multiply_adds: of all of them together.
        block_size, seed, name: as in :func:`sparsekern.transforms.sparse_wide`.

    Raises:
        ValueError: the blocks do not fit.
    """
    grids = [grid_of(twin, block_size, layer.weight.device) for twin in twins.values()]
    options: dict[str, Any] = {"seed": seed, "device": layer.weight.device, "dtype": layer.weight.dtype}
    made: list[BlockSparse] = []
    counts = match_blocks(grids, [1] * len(grids), multiply_adds)
    for (part, twin), grid, blocks in zip(twins.items(), grids, counts, strict=True):
        options |= {"block_size": grid.block, "blocks": blocks, "name": f"{name}.{part}".strip(".")}
        if isinstance(twin, nn.Linear):
            made.append(SparseLinear(twin.in_features, twin.out_features, twin.bias is not None, **options))
        else:
            made.append(SparseConv2d(**conv_arguments(twin), **options))
        made[-1].values.requires_grad_(layer.weight.requires_grad)
    return made


def output_variance(layer: nn.Linear | nn.Conv2d) -> float:
    """Return the variance of a dense layer's output without bias, for independent inputs of mean square 1."""
    weight = layer.weight.detach()
    return float(weight[0].numel() * weight.double().square().mean())


def moments(activation: nn.Module, variance: float) -> tuple[float, float]:
    """Return the mean square and the variance of an activation of normal inputs with mean 0 and this ``variance``."""
    x = torch.linspace(-8, 8, GRID, dtype=torch.float64, device="cpu")
    density = torch.exp(-x.square() / 2)
    density /= density.sum()
    activation = copy.deepcopy(activation).to("cpu", torch.float64)  # it may have parameters
    with torch.no_grad():
        y = activation(math.sqrt(variance) * x)
    mean, square = float((density * y).sum()), float((density * y.square()).sum())
    return square, square - mean**2


def variance_before(activation: nn.Module, wanted: float) -> float:
    """Return the variance of normal inputs with mean 0 whose activation has the variance ``wanted``.

    It is very large if the activation saturates below that.
    """
    low, high = 1e-12, 1e12
    for _ in range(100):  # halves the logarithm of the ratio; ends far below the precision of the integral
        middle = math.sqrt(low * high)
        low, high = (middle, high) if moments(activation, middle)[1] < wanted else (low, middle)
    return math.sqrt(low * high)


def wanted_variance(layer: nn.Linear | nn.Conv2d, init: str) -> float | None:
    """Return the variance that the output of a replacement should have; None for ``"paper"``."""
    return output_variance(layer) if init == "variance" else None


@torch.no_grad()
def draw_(layer: BlockSparse, variance: float | None) -> None:
    """Draw the values of a sparse layer from a normal distribution.

    Args:
        layer: the layer.
        variance: variance of its output without bias, for inputs of mean square 1. None: that of the paper, weights of
            variance ``2 / fan_out`` for the full shape.
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
    """Draw the weight of a dense layer by the rule of :func:`draw_`."""
    weight = layer.weight
    fan = weight[0].numel() if variance is not None else weight.shape[0] * weight[0, 0].numel()
    std = math.sqrt((2.0 if variance is None else variance) / fan)
    drawn = torch.randn(weight.shape, generator=generator_for(seed, name, "values"), dtype=torch.float64, device="cpu")
    weight.copy_(drawn * std)


@torch.no_grad()
def draw_bias_(layer: BlockSparse, dense: nn.Linear | nn.Conv2d) -> None:
    """Copy the bias of the dense layer, or, if the numbers of outputs differ, draw it with the same mean square."""
    if layer.bias is None or dense.bias is None:
        return
    if layer.bias.shape == dense.bias.shape:
        layer.bias.copy_(dense.bias)
        return
    bound = math.sqrt(3) * float(dense.bias.double().square().mean().sqrt())
    generator = generator_for(layer.seed, layer.name, "bias")
    drawn = torch.rand(layer.bias.shape, generator=generator, dtype=torch.float64, device="cpu")
    layer.bias.copy_((2 * drawn - 1) * bound)
