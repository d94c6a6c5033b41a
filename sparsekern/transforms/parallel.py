"""Sparse Parallel: the sum of ``1 / (1 - s)`` sparse branches, each with a nonlinearity."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.errors import InputError
from sparsekern.nn import BlockSparse
from sparsekern.transforms.sizes import parallel_branches
from sparsekern.transforms.twins import (
    Dense,
    check,
    dense_twin,
    draw_,
    draw_bias_,
    features,
    norm_of,
    sparse_twins,
    variance_before,
    wanted_variance,
)


class ReluSum(torch.autograd.Function):
    """``sum_j relu(h_j)`` over branches, without a second tensor as large as ``h``; saves one byte per element."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, branches: int, dim: int) -> Tensor:
        """Return the sum; ``h`` has the features of all branches, one branch after the other, along ``dim``."""
        parts = h.chunk(branches, dim)
        y = parts[0].relu()
        for part in parts[1:]:
            y += part.relu()
        ctx.save_for_backward(h > 0)
        ctx.branches, ctx.dim = branches, dim
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of ``h``: ``dy`` where ``h`` was above 0."""
        (above,) = ctx.saved_tensors
        return torch.cat([dy] * ctx.branches, ctx.dim) * above, None, None


def sum_of_branches(activation: nn.Module, h: Tensor, branches: int, dim: int) -> Tensor:
    """Return the sum over branches of ``activation(h)``; ``h`` has one branch after the other along ``dim``."""
    if type(activation) is nn.ReLU:
        y: Tensor = ReluSum.apply(h, branches, dim)
        return y
    return torch.stack(activation(h).chunk(branches, dim)).sum(0)


class SparseParallel(nn.Module):
    """``y = sum_j activation(norm_j(W_j x + b_j))``, where all branches are one block-sparse product.

    Without the activation the branches would be equivalent to one denser matrix.

    Attributes:
        branches: the sparse layer, which computes one branch after the other.
        norm: norm of the outputs of the branches; an identity for linear layers.
        activation: nonlinearity of each branch.
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
    """Return a :class:`SparseParallel` with the FLOPs of a dense layer, or a copy of that at sparsity 0.

    It can replace the dense layer in a network. The branches of a convolution have batch norm, as in the paper.

    Args:
        layer: a :class:`torch.nn.Linear` or :class:`torch.nn.Conv2d`; not changed.
        sparsity: determines the number of branches, in [0, 1); together they store as much as the dense layer.
        activation: function that returns the nonlinearity of the branches.
        init: ``"variance"``: the sum has the variance of the dense layer's output. ``"paper"``: Kaiming normal.
        block_size, pool, seed, name: as in :func:`sparse_wide`.

    Raises:
        TypeError: the layer is of another class.
        ValueError: an option is out of range, the layer is a grouped convolution, or the sparsity is so low that there
            is only one branch.
    """
    check(layer, sparsity, pool, init)
    if sparsity == 0:
        return copy.deepcopy(layer)
    variance = wanted_variance(layer, init)
    count = parallel_branches(sparsity)
    if count == 1:
        raise InputError(
            f"sparsity {sparsity} makes one branch; Sparse Parallel needs two: 1/3 or more", parameter="sparsity"
        )
    ins, outs = features(layer)
    twin = dense_twin(layer, ins, count * outs, bias=layer.bias is not None, device="meta")
    (branches,) = sparse_twins(layer, {"branches": twin}, pool * layer.weight.numel(), block_size, seed, name)
    made = activation()
    norm = norm_of(layer, count * outs)
    before = None if variance is None else variance_before(made, variance / count)
    if isinstance(norm, nn.BatchNorm2d):
        nn.init.constant_(norm.weight, 1.0 if before is None else before**0.5)
        before = variance  # the norm divides by it
    draw_(branches, before)
    draw_bias_(branches, layer)
    return SparseParallel(branches, norm, made, count).train(layer.training)
