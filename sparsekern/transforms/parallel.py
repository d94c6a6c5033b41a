"""Sparse Parallel: ``1 / (1 - s)`` sparse branches, each with its nonlinearity, and their sum."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import Tensor, nn

from sparsekern.errors import InputError
from sparsekern.nn import BlockSparse
from sparsekern.nn.converters import grid_of
from sparsekern.transforms.branches import sum_of_branches
from sparsekern.transforms.init import check_init, draw_, draw_bias_, variance_before, wanted_variance
from sparsekern.transforms.match import match_blocks
from sparsekern.transforms.sizes import parallel_branches
from sparsekern.transforms.twins import Dense, check, dense_twin, features, norm_of, sparse_twin


class SparseParallel(nn.Module):
    """``y = sum_j activation(norm_j(W_j x + b_j))``: all branches are one block-sparse product.

    Without the activation the branches would be one matrix of a higher density.

    Attributes:
        branches: the sparse layer; its outputs are those of the branches one after the other.
        norm: of the outputs of the branches; an identity for linear layers.
        activation: of each branch.
        count: number of branches.
    """

    def __init__(self, branches: BlockSparse, norm: nn.Module, activation: nn.Module, count: int) -> None:
        super().__init__()
        self.branches, self.norm, self.activation, self.count = branches, norm, activation, count

    def forward(self, input: Tensor) -> Tensor:
        """Return an output of the dense layer's shape."""
        dim = -1 if self.branches.grid.kernel is None else -3
        return sum_of_branches(self.activation, self.norm(self.branches(input)), self.count, dim)

    def extra_repr(self) -> str:
        """Return the number of branches, for ``print(model)``."""
        return f"count={self.count}"


def sparse_parallel(
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
    """Return a :class:`SparseParallel` that takes as many FLOPs as a dense layer; a copy of that at sparsity 0.

    Its place in a network is that of the dense layer. The branches of a convolution have batch norm, as in the paper.

    Args:
        layer: an :class:`torch.nn.Linear` or :class:`torch.nn.Conv2d`; not changed.
        sparsity: decides the number of branches, in [0, 1); together they have the blocks of the dense layer.
        block_size: side of the blocks, or ``(out, in)``. Default: 32 on a CPU, 64 on CUDA; a convolution's no wider
            than its channels.
        activation: makes the nonlinearity of the branches.
        pool: blocks to store for each one that the FLOPs allow, 1 or more: candidates of a method that chooses.
        init: ``"variance"``: the sum varies as the dense layer's output. ``"paper"``: Kaiming normal.
        seed: with ``name`` it decides topology and values.
        name: the layer's name in the model.

    Raises:
        TypeError: another kind of layer.
        ValueError: a sparsity or init out of range, a grouped convolution, or so low a sparsity that there is one
            branch.
    """
    check(layer, sparsity, pool)
    check_init(init)
    if sparsity == 0:
        return copy.deepcopy(layer)
    variance = wanted_variance(layer, init)
    count = parallel_branches(sparsity)
    if count == 1:
        raise InputError(f"sparsity {sparsity} makes one branch; Sparse Parallel needs two: 1/3 or more")
    ins, outs = features(layer)
    twin = dense_twin(layer, ins, count * outs, bias=layer.bias is not None, device="meta")
    grid = grid_of(twin, block_size, layer.weight.device)
    (blocks,) = match_blocks([grid], [1], pool * layer.weight.numel())
    branches = sparse_twin(twin, blocks, grid.block, layer=layer, seed=seed, name=f"{name}.branches".lstrip("."))
    made = activation()
    norm = norm_of(layer, count * outs)
    before = None if variance is None else variance_before(made, variance / count)
    if isinstance(norm, nn.BatchNorm2d):
        nn.init.constant_(norm.weight, 1.0 if before is None else before**0.5)
        before = variance  # the norm divides by whatever it is
    draw_(branches, before)
    draw_bias_(branches, layer)
    return SparseParallel(branches, norm, made, count).train(layer.training)
