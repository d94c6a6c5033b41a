"""Sparse Doped: a sparse layer and beside it a dense path of low rank, which takes the FLOPs that the other saves."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from sparsekern.nn import BlockSparse
from sparsekern.nn.converters import grid_of
from sparsekern.transforms.init import check_init, draw_, draw_bias_, draw_dense_, wanted_variance
from sparsekern.transforms.match import match_blocks
from sparsekern.transforms.sizes import doped_rank
from sparsekern.transforms.twins import Dense, check, dense_twin, features, sparse_twin


class SparseDoped(nn.Module):
    """``y = W x + V U x + b``: W sparse, U and V dense.

    Attributes:
        sparse: W and the bias.
        inner: U; of a convolution its kernel and stride.
        outer: V; of a convolution pointwise.
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
    """Return a :class:`SparseDoped` that takes as many FLOPs as a dense layer; a copy of that at sparsity 0.

    Its place in a network is that of the dense layer. The authors' code sparsifies the path of low rank too, so that
    its sum is below the FLOPs of the dense layer; here that path is dense, as the paper's formula says.

    Args:
        layer: an :class:`torch.nn.Linear` or :class:`torch.nn.Conv2d`; not changed.
        sparsity: of the sparse path, in [0, 1); decides the rank of the other, a multiple of 8. The number of blocks is
            such that the sum takes the dense layer's FLOPs.
        block_size: side of the blocks, or ``(out, in)``. Default: 32 on a CPU, 64 on CUDA; a convolution's no wider
            than its channels.
        pool: blocks to store for each one that the FLOPs allow, 1 or more: candidates of a method that chooses.
        init: ``"variance"``: the output varies as the dense layer's, each path according to its FLOPs. ``"paper"``:
            Kaiming normal.
        seed: with ``name`` it decides topology and values.
        name: the layer's name in the model.

    Raises:
        TypeError: another kind of layer.
        ValueError: a sparsity or init out of range, a grouped convolution, or no work left for a block.
    """
    check(layer, sparsity, pool)
    check_init(init)
    if sparsity == 0:
        return copy.deepcopy(layer)
    variance = wanted_variance(layer, init)
    ins, outs = features(layer)
    rank = doped_rank(layer.weight[0].numel(), outs, sparsity)
    inner = dense_twin(layer, ins, rank, bias=False)
    outer = dense_twin(layer, rank, outs, pointwise=True, bias=False)
    total, beside = layer.weight.numel(), inner.weight.numel() + outer.weight.numel()
    grid = grid_of(layer, block_size)
    (blocks,) = match_blocks([grid], [1], pool * (total - beside))
    sparse = sparse_twin(layer, blocks, grid.block, layer=layer, seed=seed, name=f"{name}.sparse".lstrip("."))
    share = beside / total
    draw_(sparse, None if variance is None else variance * (1 - share))
    draw_dense_(inner, variance, seed, f"{name}.inner")
    draw_dense_(outer, None if variance is None else share, seed, f"{name}.outer")
    for part in (inner, outer):
        part.weight.requires_grad_(layer.weight.requires_grad)
    draw_bias_(sparse, layer)
    return SparseDoped(sparse, inner, outer).train(layer.training)
