"""Sparse Factorized: two sparse factors with a nonlinearity between, ``1 / (1 - s)`` times as wide as dense ones."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import Tensor, nn

from sparsekern.nn import BlockSparse
from sparsekern.nn.converters import grid_of
from sparsekern.transforms.init import check_init, draw_, draw_bias_, moments, wanted_variance
from sparsekern.transforms.match import match_blocks
from sparsekern.transforms.sizes import factorized_features
from sparsekern.transforms.twins import Dense, check, dense_twin, features, norm_of, sparse_twin


class SparseFactorized(nn.Module):
    """``y = V activation(norm(U x)) + b``, both factors sparse.

    Attributes:
        inner: U; of a convolution its kernel and stride.
        norm: between the factors; an identity for linear layers.
        activation: between the factors.
        outer: V, and the bias; of a convolution pointwise.
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
    """Return a :class:`SparseFactorized` that takes as many FLOPs as a dense layer; a copy of that at sparsity 0.

    Its place in a network is that of the dense layer. A convolution has batch norm between its factors, as in the
    paper.

    Args:
        layer: an :class:`torch.nn.Linear` or :class:`torch.nn.Conv2d`; not changed.
        sparsity: of both factors, in [0, 1); decides the features between them, which are whole blocks. The blocks of
            both together have the elements of the dense layer.
        block_size: side of the blocks, or ``(out, in)``. Default: 32 on a CPU, 64 on CUDA; a convolution's no wider
            than its channels.
        activation: makes the nonlinearity between the factors.
        pool: blocks to store for each one that the FLOPs allow, 1 or more: candidates of a method that chooses.
        init: ``"variance"``: the output varies as the dense layer's. ``"paper"``: Kaiming normal.
        seed: with ``name`` it decides topology and values.
        name: the layer's name in the model.

    Raises:
        TypeError: another kind of layer.
        ValueError: a sparsity or init out of range, a grouped convolution, or no room for the blocks.
    """
    check(layer, sparsity, pool)
    check_init(init)
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
    grids = {part: grid_of(twin, block_size, layer.weight.device) for part, twin in twins.items()}
    counts = dict(zip(grids, match_blocks(list(grids.values()), [1, 1], pool * layer.weight.numel()), strict=True))
    inner, outer = (
        sparse_twin(twin, counts[part], grids[part].block, layer=layer, seed=seed, name=f"{name}.{part}".lstrip("."))
        for part, twin in twins.items()
    )
    norm, made = norm_of(layer, between), activation()
    after = None
    if variance is not None:
        square, _ = moments(made, 1.0 if isinstance(layer, nn.Conv2d) else variance)
        after = variance / square if square else 0.0
    draw_(inner, variance)
    draw_(outer, after)
    draw_bias_(outer, layer)
    return SparseFactorized(inner, norm, made, outer).train(layer.training)
