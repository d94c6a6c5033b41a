"""The four transforms of a layer (Thangarasa et al., "Sparse-IFT", ICML 2024).

* Wide: ``sqrt(1 / (1 - s))`` times the inputs and outputs, and as many stored weights as the dense layer.
* Parallel: the sum of ``1 / (1 - s)`` sparse branches, each with a nonlinearity.
* Factorized: two sparse factors with a nonlinearity, ``1 / (1 - s)`` times as wide as dense factors.
* Doped: a sparse layer plus a dense path of low rank, which takes the FLOPs that the sparse layer saves.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.errors import InputError
from sparsekern.nn import BlockSparse
from sparsekern.nn.converters import grid_of
from sparsekern.transforms.twins import (
    Dense,
    check,
    dense_twin,
    doped_rank,
    draw_,
    draw_bias_,
    draw_dense_,
    factorized_features,
    features,
    moments,
    norm_of,
    parallel_branches,
    sparse_twins,
    variance_before,
    wanted_variance,
    wide_width,
)


def sparse_wide(
    layer: Dense,
    sparsity: float,
    *,
    block_size: int | tuple[int, int] | None = None,
    widen_in: bool = True,
    widen_out: bool = True,
    pool: float = 1.0,
    init: str = "variance",
    seed: int = 0,
    name: str = "",
) -> nn.Module:
    """Return a wider sparse layer with the FLOPs of a dense layer, or a copy of that at sparsity 0.

    The layers around it must be widened too; :func:`transform` does so for a whole network.

    Args:
        layer: a :class:`torch.nn.Linear` or :class:`torch.nn.Conv2d`; not changed.
        sparsity: determines the width, in [0, 1). Since widths are rounded to whole blocks, the resulting sparsity may
            differ; the FLOPs do not.
        block_size: side of the blocks, or ``(out, in)``. Default: 32 on a CPU, 64 on CUDA; in a convolution no larger
            than its channels need.
        widen_in, widen_out: whether to widen the inputs and the outputs.
        pool: stored blocks per block that the FLOPs allow, 1 or more: the candidates of a method that chooses blocks.
        init: ``"variance"``: the output has the variance of the dense layer's. ``"paper"``: Kaiming normal for the full
            shape.
        seed: seed of the topology and the values, together with ``name``.
        name: the layer's name in the model.

    Raises:
        TypeError: the layer is of another class.
        ValueError: an option is out of range, the layer is a grouped convolution, or the blocks do not fit.
    """
    check(layer, sparsity, pool, init)
    if sparsity == 0:
        return copy.deepcopy(layer)
    variance = wanted_variance(layer, init)
    ins, outs = features(layer)
    width = wide_width(sparsity, grid_of(layer, block_size).block)
    sizes = (width(ins) if widen_in else ins, width(outs) if widen_out else outs)
    twin = dense_twin(layer, *sizes, bias=layer.bias is not None, device="meta")
    (wide,) = sparse_twins(layer, {"": twin}, pool * layer.weight.numel(), block_size, seed, name)
    draw_(wide, variance)
    draw_bias_(wide, layer)
    return wide.train(layer.training)


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
