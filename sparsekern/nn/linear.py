"""The sparse drop-in replacement for torch.nn.Linear."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F

from sparsekern import ops
from sparsekern.nn.block_sparse import BlockSparse, check_topology_and_dtype
from sparsekern.nn.converters import register_converter
from sparsekern.topology import Grid, Topology, block_pair


class SparseLinear(BlockSparse):
    """Linear layer with a block-sparse weight: ``y = x W' + b``, where only some blocks of W are stored.

    Input and output are dense. Forward, backward and the optimizer hold only the stored blocks, never a dense weight or
    weight gradient.

    Args:
        in_features, out_features, bias, device, dtype: as in :class:`torch.nn.Linear`.
        sparsity: fraction of blocks that are not stored, in [0, 1), rounded to whole blocks. Ignored if ``blocks`` or
            ``topology`` is given.
        block_size: side of the blocks, or ``(out, in)``. Need not divide the feature counts. Default: 32 on a CPU, 64
            on CUDA.
        blocks: number of stored blocks, instead of ``sparsity``.
        capacity: number of slots, at least ``blocks``; the others stay free, for training methods in which layers
            exchange blocks. Default: ``blocks``.
        init: ``"balanced"`` (block rows differ by at most one block, and so do block columns) or ``"random"``.
        init_scale: factor on the initial values and bias, which are uniform in ``+-1 / sqrt(fan_in)`` as in PyTorch.
        topology: places of the blocks, instead of drawn ones; see :mod:`sparsekern.topology`.
        seed: seed of the topology and the values, together with ``name``. Default: drawn from torch's global generator.
        name: the layer's name in the model; layers with the same seed and different names differ.

    Raises:
        ValueError: a size, sparsity or count is out of range, or ``init`` is unknown.

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
        check_topology_and_dtype(topology, dtype)
        sizes = {"in_features": in_features, "out_features": out_features}
        grid = self.grid_for(sizes, block_size if topology is None else topology.grid.block, device)
        super().__init__(
            grid,
            topology,
            bias=bias,
            sparsity=sparsity,
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

    @staticmethod
    def grid_for(
        arguments: dict[str, Any], block_size: int | tuple[int, int] | None, device: torch.device | str | None
    ) -> Grid:
        """Return the grid of a layer with these constructor arguments; None takes the device's default block size."""
        size = default_block_size(device) if block_size is None else block_size
        return Grid(arguments["out_features"], arguments["in_features"], block_pair(size))

    def forward(self, input: Tensor | Proxy) -> Tensor:
        """Return ``input W' + bias``; see :func:`sparsekern.ops.linear` for the errors."""
        if isinstance(input, Proxy):
            return self.traced(input)
        values, index, probe = self.operands()
        return ops.linear(input, values, self.bias, index, self.grid, probe)

    def dense_forward(self, input: Tensor, weight: Tensor) -> Tensor:
        """Return the output of PyTorch's linear layer with a dense ``weight (out, in)`` and this layer's bias."""
        return F.linear(input, weight, self.bias)

    def extra_repr(self) -> str:
        """Return the sizes, the blocks and the sparsity, for ``print(model)``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"block_size={self.block_size}, {self._counts_repr()}"
        )


def linear_arguments(linear: nn.Linear | SparseLinear) -> dict[str, Any]:
    """Return a layer's constructor arguments except device and dtype, with the sizes of its actual weight."""
    out_features, in_features = linear.weight.shape
    return {"in_features": in_features, "out_features": out_features, "bias": linear.bias is not None}


register_converter(nn.Linear, SparseLinear, linear_arguments)


def default_block_size(device: torch.device | str | None) -> int:
    """Return the default block size on a device: 64 on CUDA, 32 elsewhere."""
    device = torch.get_default_device() if device is None else torch.device(device)
    return 64 if device.type == "cuda" else 32
