"""Sparse Doped: a sparse layer plus a dense path of low rank, which takes the FLOPs that the sparse layer saves."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from sparsekern.nn import BlockSparse
from sparsekern.transforms.sizes import doped_rank
from sparsekern.transforms.twins import (
    Dense,
    check,
    dense_twin,
    draw_,
    draw_bias_,
    draw_dense_,
    features,
    sparse_twins,
    wanted_variance,
)


class SparseDoped(nn.Module):
    """``y = W x + V U x + b`` with a sparse W and dense U and V.

    Attributes:
        sparse: W and the bias.
        inner: U; for a convolution, with its kernel and stride.
        outer: V; for a convolution, pointwise.
    """

    def __init__(self, sparse: BlockSparse, inner: nn.Module, outer: nn.Module) -> None:
        super().__init__()
        self.sparse, self.inner, self.outer = sparse, inner, outer

    def forward(self, input: Tensor) -> Tensor:
        """Return an output of the dense layer's shape."""
        y: Tensor = self.sparse(input) + self.outer(self.inner(input))
        return y


def sparse_doped(
    layer: Dense,
    sparsity: float,
    *,
    block_size: int | tuple[int, int] | None = None,
    pool: float = 1.0,
    init: str = "variance",
    seed: int = 0,
    name: str = "",
) -> nn.Module:
    """Return a :class:`SparseDoped` with the FLOPs of a dense layer, or a copy of that at sparsity 0.

    It can replace the dense layer in a network. The path of low rank is dense, as in the paper's formula; the authors'
    code makes it sparse too, and then takes fewer FLOPs than the dense layer.

    Args:
        layer: a :class:`torch.nn.Linear` or :class:`torch.nn.Conv2d`; not changed.
        sparsity: sparsity of the sparse path, in [0, 1); determines the rank of the dense path, a multiple of 8. Both
            together take the FLOPs of the dense layer.
        init: ``"variance"``: the output has the variance of the dense layer's, each path in proportion to its FLOPs.
            ``"paper"``: Kaiming normal.
        block_size, pool, seed, name: as in :func:`sparse_wide`.

    Raises:
        TypeError: the layer is of another class.
        ValueError: an option is out of range, the layer is a grouped convolution, or no FLOPs are left for a block.
    """
    check(layer, sparsity, pool, init)
    if sparsity == 0:
        return copy.deepcopy(layer)
    variance = wanted_variance(layer, init)
    ins, outs = features(layer)
    rank = doped_rank(layer.weight[0].numel(), outs, sparsity)
    inner = dense_twin(layer, ins, rank, bias=False)
    outer = dense_twin(layer, rank, outs, pointwise=True, bias=False)
    total, beside = layer.weight.numel(), inner.weight.numel() + outer.weight.numel()
    (sparse,) = sparse_twins(layer, {"sparse": layer}, pool * (total - beside), block_size, seed, name)
    share = beside / total
    draw_(sparse, None if variance is None else variance * (1 - share))
    draw_dense_(inner, variance, seed, f"{name}.inner")
    draw_dense_(outer, None if variance is None else share, seed, f"{name}.outer")
    for part in (inner, outer):
        part.weight.requires_grad_(layer.weight.requires_grad)
    draw_bias_(sparse, layer)
    return SparseDoped(sparse, inner, outer).train(layer.training)
