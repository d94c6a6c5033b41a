"""The drop-in replacement of torch.nn.Linear."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsekern import ops
from sparsekern.errors import InputError
from sparsekern.nn.block_sparse import BlockSparse, check_given, is_proxy
from sparsekern.nn.converters import converter_for, register_converter
from sparsekern.topology import (
    Grid,
    Topology,
    allocate,
    block_pair,
    by_norm,
    check_count,
)


class SparseLinear(BlockSparse):
    """*Weight*-sparse linear layer: ``y = x W' + b`` where only the stored blocks of W exist.

    Forward, backward and optimizer hold the blocks, never a dense weight or gradient.

    Args:
        in_features, out_features, bias, device, dtype: as in :class:`torch.nn.Linear`.
        sparsity: fraction of blocks left out, in [0, 1); rounded to whole blocks. Ignored if ``blocks`` is given.
        block_size: side of the blocks, or ``(out, in)``. Need not divide the feature counts. Default: 32 on a CPU, 64
            on CUDA.
        blocks: number of blocks, instead of ``sparsity``.
        capacity: number of slots, at least ``blocks``; the rest are free, for methods whose layers grow.
        init: ``"balanced"`` (all block rows alike, all block columns alike) or ``"random"``.
        init_scale: times the initial values and biases, which are uniform in ``+-1 / sqrt(fan_in)``, as in PyTorch.
        topology: places of the blocks, instead of a drawn one; see :mod:`sparsekern.topology`.
        seed: with ``name`` it decides topology and values. Default: drawn from torch's global generator.
        name: the layer's name in the model, so that layers of one seed differ.

    Raises:
        ValueError: a size, sparsity or count out of range, or an unknown init.

    Shape:
        input ``(*, in_features)``, output ``(*, out_features)``.

    Example:
        >>> import sparsekern as sk
        >>> layer = sk.SparseLinear(1024, 4096, sparsity=0.9, block_size=32)
        >>> layer(torch.randn(8, 1024)).shape
        torch.Size([8, 4096])
    """

    dense_class = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        sparsity: float = 0.9,
        block_size: int | tuple[int, int] | None = None,
        blocks: int | None = None,
        capacity: int | None = None,
        init: str = "balanced",
        init_scale: float = 1.0,
        topology: Topology | None = None,
        seed: int | None = None,
        name: str = "",
    ) -> None:
        check_given(topology, dtype)
        if topology is not None:
            grid, blocks = topology.grid, topology.slots
            if grid.kernel is not None or grid.groups != 1:
                raise InputError(
                    f"topology is that of a convolution with kernel {grid.kernel}; use SparseConv2d for it",
                    parameter="topology",
                )
            if (grid.out_features, grid.in_features) != (out_features, in_features):
                raise InputError(
                    f"topology is for {grid.out_features} x {grid.in_features}, "
                    f"the layer is {out_features} x {in_features}",
                    parameter="topology",
                )
            topology = replace(topology, grid=replace(grid, transposed=False))  # that is said by stand_for
            grid = topology.grid
        else:
            grid = linear_grid(out_features, in_features, block_size, device)
            if blocks is None:
                (blocks,) = allocate([grid], sparsity)
            blocks = check_count(grid, blocks)
        super().__init__(
            grid,
            topology,
            blocks=blocks,
            capacity=capacity,
            init=init,
            init_scale=init_scale,
            seed=seed,
            name=name,
            device=device,
            dtype=dtype,
        )
        self.in_features, self.out_features = grid.in_features, grid.out_features
        if bias:
            self.bias = nn.Parameter(torch.empty(grid.out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    @classmethod
    def from_dense(
        cls,
        linear: nn.Linear,
        *,
        sparsity: float = 0.9,
        block_size: int | tuple[int, int] | None = None,
        blocks: int | None = None,
        capacity: int | None = None,
        topology: Topology | None = None,
        seed: int | None = None,
        name: str = "",
    ) -> SparseLinear:
        """Keep the blocks of largest norm of a dense layer (or those of ``topology``), with their values and the bias.

        The other arguments are those of the class. Device and dtype are the dense layer's.
        """
        converter = converter_for(linear, cls, "linear")
        weight = linear.weight.detach()
        if topology is None:
            grid = converter.grid(linear, block_size)
            if blocks is None:
                (blocks,) = allocate([grid], sparsity)
            topology = by_norm(grid, weight, blocks)
        layer = cls(
            **converter.arguments(linear),
            device=weight.device,
            dtype=weight.dtype,
            capacity=capacity,
            topology=topology,
            seed=seed,
            name=name,
        )
        layer.stand_for(linear)
        layer.copy_dense_(linear)
        return layer

    @staticmethod
    def grid_for(
        arguments: dict[str, Any], block_size: int | tuple[int, int] | None, device: torch.device | str | None
    ) -> Grid:
        """Return the grid of a layer built with ``arguments``; without a block size, that of the device's default."""
        return linear_grid(arguments["out_features"], arguments["in_features"], block_size, device)

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input W' + bias``; see :func:`sparsekern.ops.linear` for the errors."""
        if is_proxy(input):
            return self.traced(input)
        return ops.linear(input, self.values, self.bias, self.index, self.grid, self.probe)

    def dense_forward(self, input: Tensor, weight: Tensor) -> Tensor:
        """Return PyTorch's product of ``input`` with a dense weight ``(out, in)``, and this layer's bias."""
        return F.linear(input, weight, self.bias)

    def extra_repr(self) -> str:
        """Return the sizes, the blocks and the sparsity, for ``print(model)``."""
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"block_size={self.block_size}"
        )
        if self.row.is_meta:
            return f"{text}, slots={self.values.shape[0]}"
        return f"{text}, blocks={self.topology.blocks()}/{self.grid.cells}, sparsity={self.sparsity:.4g}"


def linear_arguments(linear: nn.Linear | SparseLinear) -> dict[str, Any]:
    """Return the arguments that both classes have, but for device and dtype, from the weight that is really there."""
    out_features, in_features = linear.weight.shape
    return {"in_features": in_features, "out_features": out_features, "bias": linear.bias is not None}


register_converter(nn.Linear, SparseLinear, linear_arguments)


def linear_grid(
    out_features: int, in_features: int, block_size: int | tuple[int, int] | None, device: torch.device | str | None
) -> Grid:
    """Return the grid of a linear layer; without a block size, that of the device's default."""
    size = default_block_size(device) if block_size is None else block_size
    return Grid(out_features, in_features, block_pair(size))


def default_block_size(device: torch.device | str | None) -> int:
    """Return the block size that is a good start on a device: 64 on CUDA, 32 elsewhere."""
    device = torch.get_default_device() if device is None else torch.device(device)
    return 64 if device.type == "cuda" else 32
