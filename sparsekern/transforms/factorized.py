"""Sparse Factorized: two sparse factors with a nonlinearity, ``1 / (1 - s)`` times as wide as dense factors."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import Tensor, nn

from sparsekern.nn import BlockSparse
from sparsekern.nn.converters import grid_of
from sparsekern.transforms.sizes import factorized_features
from sparsekern.transforms.twins import (
    Dense,
    check,
    dense_twin,
    draw_,
    draw_bias_,
    features,
    moments,
    norm_of,
    sparse_twins,
    wanted_variance,
)


class SparseFactorized(nn.Module):
    """``y = V activation(norm(U x)) + b`` with sparse factors U and V.

    Attributes:
        inner: U; for a convolution, with its kernel and stride.
        norm: norm between the factors; an identity for linear layers.
        activation: nonlinearity between the factors.
        outer: V and the bias; for a convolution, pointwise.
    """

    def __init__(self, inner: BlockSparse, norm: nn.Module, activation: nn.Module, outer: BlockSparse) -> None:
        super().__init__()
        self.inner, self.norm, self.activation, self.outer = inner, norm, activation, outer

    def forward(self, input: Tensor) -> Tensor:
        """Return an output of the dense layer's shape."""
        y: Tensor = self.outer(self.activation(self.norm(self.inner(input))))
        return y


def sparse_factorized(
    layer: Dense,
    sparsity: float,
    *,
    block_size: int | tuple[int, int] | None = None,
    activation: Callable[[], nn.Module] = nn.ReLU,
    pool: float = 1.0,
    init: str = "variance",
    seed: int = 0,
    name: str = "",
) -> nn.Module:
    """Return a :class:`SparseFactorized` with the FLOPs of a dense layer, or a copy of that at sparsity 0.

    It can replace the dense layer in a network. A convolution has batch norm between its factors, as in the paper.

    Args:
        layer: a :class:`torch.nn.Linear` or :class:`torch.nn.Conv2d`; not changed.
        sparsity: sparsity of both factors, in [0, 1); determines the features between them, in whole blocks. Together
            the factors store as much as the dense layer.
        activation: function that returns the nonlinearity between the factors.
        init: ``"variance"``: the output has the variance of the dense layer's. ``"paper"``: Kaiming normal.
        block_size, pool, seed, name: as in :func:`sparse_wide`.

    Raises:
        TypeError: the layer is of another class.
        ValueError: an option is out of range, the layer is a grouped convolution, or the blocks do not fit.
    """
    check(layer, sparsity, pool, init)
    if sparsity == 0:
        return copy.deepcopy(layer)
    variance = wanted_variance(layer, init)
    ins, outs = features(layer)
    taps = layer.weight[0, 0].numel()
    multiple = max(grid_of(layer, block_size).block)
    between = factorized_features(taps * ins, outs, sparsity, multiple)
    twins = {
        "inner": dense_twin(layer, ins, between, bias=False, device="meta"),
        "outer": dense_twin(layer, between, outs, pointwise=True, bias=layer.bias is not None, device="meta"),
    }
    inner, outer = sparse_twins(layer, twins, pool * layer.weight.numel(), block_size, seed, name)
    norm, made = norm_of(layer, between), activation()
    after = None
    if variance is not None:
        square, _ = moments(made, 1.0 if isinstance(layer, nn.Conv2d) else variance)
        after = variance / square if square else 0.0
    draw_(inner, variance)
    draw_(outer, after)
    draw_bias_(outer, layer)
    return SparseFactorized(inner, norm, made, outer).train(layer.training)
