"""The drop-in replacement of torch.nn.Conv2d."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsekern import ops
from sparsekern.errors import InputError
from sparsekern.kernels.contract import ConvShape
from sparsekern.nn.block_sparse import BlockSparse, check_given, is_proxy
from sparsekern.nn.converters import converter_for, register_converter
from sparsekern.nn.linear import default_block_size
from sparsekern.topology import (
    Grid,
    Topology,
    allocate,
    block_pair,
    by_norm,
    check_count,
    check_multiple,
    conv_grid,
    one_tap,
)
from sparsekern.topology.arguments import check_whole, whole_sides

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class SparseConv2d(BlockSparse):
    """*Weight*-sparse convolution: only the stored blocks of the kernel exist. Its input and output are dense.

    The weight is cut into blocks of output by input channels inside each tap and each group. Forward, backward and
    optimizer hold the blocks, never a dense weight or gradient.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype:
            as in :class:`torch.nn.Conv2d`.
        sparsity: fraction of blocks left out, in [0, 1); rounded to whole blocks. Ignored if ``blocks`` is given.
        block_size: side of the blocks, or ``(out, in)``, in channels. Need not divide them. Default: 32 on a CPU, 64
            on CUDA, and no wider than a group's channels need (16 at least).
        blocks: number of blocks, instead of ``sparsity``.
        capacity: number of slots, at least ``blocks``; the rest are free, for methods whose layers grow.
        init: ``"balanced"`` (all block rows alike, all block columns alike) or ``"random"``.
        init_scale: times the initial values and biases, which are uniform in ``+-1 / sqrt(fan_in)``, as in PyTorch.
        topology: places of the blocks, instead of a drawn one; see :mod:`sparsekern.topology`.
        seed: with ``name`` it decides topology and values. Default: drawn from torch's global generator.
        name: the layer's name in the model, so that layers of one seed differ.
        tie_taps: store a block of channels in all taps or in none. ``blocks`` still counts those of every tap.

    Raises:
        ValueError: a size, sparsity or count out of range, an unknown init or padding mode, or taps that are not tied.
        TypeError: a size that is neither an int nor a pair of ints.

    Shape:
        input ``(N, Cin, H, W)`` or ``(Cin, H, W)``, output ``(N, Cout, Ho, Wo)`` or ``(Cout, Ho, Wo)``. Channels last
        is native: a contiguous input is copied into it, and the output is channels last.

    Example:
        >>> import sparsekern as sk
        >>> conv = sk.SparseConv2d(64, 128, 3, padding=1, sparsity=0.9, block_size=16)
        >>> conv(torch.randn(8, 64, 14, 14)).shape
        torch.Size([8, 128, 14, 14])
    """

    dense_class: type[nn.Module] = nn.Conv2d
    dimensions = 2

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
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
        tie_taps: bool = False,
    ) -> None:
        check_given(topology, dtype)
        if padding_mode not in PADDING_MODES:
            raise InputError(
                f"padding_mode is {padding_mode!r}; it must be one of {', '.join(PADDING_MODES)}",
                parameter="padding_mode",
            )
        kernel, steps, spacing = (
            sides(size_name, size, self.dimensions)
            for size_name, size in (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation))
        )
        around = four_sides(padding, kernel, steps, spacing)
        side = block_size if topology is None else topology.grid.block
        grid = layer_grid(in_channels, out_channels, kernel, side, groups, device)
        if topology is not None:
            blocks = topology.slots
            if topology.grid != grid:
                raise InputError(f"topology is for {topology.grid}, the layer is {grid}", parameter="topology")
        else:
            if blocks is None:
                blocks = blocks_of(grid, sparsity, tie_taps)
            blocks = check_count(grid, blocks)
            if tie_taps:
                check_multiple(grid, blocks)
        super().__init__(
            grid,
            topology,
            tie_taps=tie_taps,
            blocks=blocks,
            capacity=capacity,
            init=init,
            init_scale=init_scale,
            seed=seed,
            name=name,
            device=device,
            dtype=dtype,
        )
        in_channels, out_channels, groups = grid.tap_in * grid.groups, grid.out_features, grid.groups
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.dilation = kernel, steps, spacing
        self.padding = padding if isinstance(padding, str) else (around[0], around[2])[-self.dimensions :]
        self.padding_mode = padding_mode
        self._around = around
        inside = around if padding_mode == "zeros" else (0, 0, 0, 0)
        self.conv_shape = ConvShape(
            in_channels, out_channels, two(kernel, 1), two(steps, 1), inside, two(spacing, 1), groups
        )
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    @classmethod
    def from_dense(
        cls,
        conv: nn.Conv2d,
        *,
        sparsity: float = 0.9,
        block_size: int | tuple[int, int] | None = None,
        blocks: int | None = None,
        capacity: int | None = None,
        topology: Topology | None = None,
        seed: int | None = None,
        name: str = "",
        tie_taps: bool = False,
    ) -> SparseConv2d:
        """Keep the blocks of largest norm of a dense layer (or those of ``topology``), with their values and the bias.

        The other arguments are those of the class. Device and dtype are the dense layer's.
        """
        converter = converter_for(conv, cls, "conv")
        weight = conv.weight.detach()
        if topology is None:
            grid = converter.grid(conv, block_size)
            if blocks is None:
                blocks = blocks_of(grid, sparsity, tie_taps)
            topology = by_norm(grid, weight, blocks, tie_taps)
        layer = cls(
            **converter.arguments(conv),
            device=weight.device,
            dtype=weight.dtype,
            capacity=capacity,
            topology=topology,
            seed=seed,
            name=name,
            tie_taps=tie_taps,
        )
        layer.stand_for(conv)
        layer.copy_dense_(conv)
        return layer

    @staticmethod
    def grid_for(
        arguments: dict[str, Any], block_size: int | tuple[int, int] | None, device: torch.device | str | None
    ) -> Grid:
        """Return the grid of a layer built with ``arguments``; without a block size, that of the device's default."""
        ins, outs, kernel, groups = (
            arguments[name] for name in ("in_channels", "out_channels", "kernel_size", "groups")
        )
        return layer_grid(ins, outs, kernel, block_size, groups, device)

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of ``input``; see :func:`sparsekern.ops.conv2d` for the errors."""
        if is_proxy(input):
            return self.traced(input)
        if self.padding_mode != "zeros":
            input = self._padded(input)
        return ops.conv2d(input, self.values, self.bias, self.index, self.grid, self.conv_shape, self.probe)

    def dense_forward(self, input: Tensor, weight: Tensor) -> Tensor:
        """Return PyTorch's convolution of ``input`` with a dense weight and this layer's sizes and bias."""
        if self.padding_mode == "zeros" and isinstance(self.padding, tuple):
            padding = self.padding
        else:
            input, padding = self._padded(input), (0, 0)
        return F.conv2d(input, weight, self.bias, self.stride, padding, self.dilation, self.groups)

    def _padded(self, input: Tensor) -> Tensor:
        top, bottom, left, right = self._around
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(input, (left, right, top, bottom), mode=mode)

    def extra_repr(self) -> str:
        """Return the sizes, the blocks and the sparsity, for ``print(model)``."""
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"]
        one, none = (1,) * self.dimensions, (0,) * self.dimensions
        for name, usual in (("padding", none), ("dilation", one), ("groups", 1), ("padding_mode", "zeros")):
            if getattr(self, name) != usual:
                parts.append(f"{name}={getattr(self, name)}")
        parts.append(f"bias={self.bias is not None}, block_size={self.block_size}")
        if self.tie_taps:
            parts.append("tie_taps=True")
        if self.row.is_meta:
            parts.append(f"slots={self.values.shape[0]}")
        else:
            parts.append(f"blocks={self.topology.blocks()}/{self.grid.cells}, sparsity={self.sparsity:.4g}")
        return ", ".join(parts)


def layer_grid(
    in_channels: int,
    out_channels: int,
    kernel: tuple[int, ...],
    block_size: int | tuple[int, int] | None,
    groups: int,
    device: torch.device | str | None,
) -> Grid:
    """Return the grid of a convolution; without a block size, that of the device's default."""
    if block_size is not None:
        return conv_grid(in_channels, out_channels, kernel, block_pair(block_size), groups)
    usual, groups = default_block_size(device), check_whole("groups", groups)
    block = tuple(
        min(usual, max(16, 1 << (check_whole(name, channels) // max(1, groups) - 1).bit_length()))
        for name, channels in (("out_channels", out_channels), ("in_channels", in_channels))
    )
    return conv_grid(in_channels, out_channels, kernel, (block[0], block[1]), groups)


def blocks_of(grid: Grid, sparsity: float, tie_taps: bool) -> int:
    """Return the number of blocks at a sparsity; with tied taps, the same number in each tap."""
    if not tie_taps:
        return allocate([grid], sparsity)[0]
    return allocate([one_tap(grid)], sparsity)[0] * grid.taps


def conv_arguments(conv: nn.Conv1d | nn.Conv2d | SparseConv2d) -> dict[str, Any]:
    """Return the arguments that dense and sparse classes have, but for device and dtype."""
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return {name: getattr(conv, name) for name in names} | {"bias": conv.bias is not None}


register_converter(nn.Conv2d, SparseConv2d, conv_arguments)


def sides(name: str, size: int | tuple[int, ...], count: int, least: int = 1) -> tuple[int, ...]:
    """Return the ``count`` numbers of a size, top to bottom first, from an int or a tuple.

    Raises:
        TypeError: neither.
        ValueError: a number below ``least``.
    """
    whole = whole_sides(name, size, count, "an int or a pair of ints" if count == 2 else "an int or a tuple of one")
    if min(whole) < least:
        raise InputError(f"{name} is {size}; it must be {least} or more each way", parameter=name)
    return whole


def four_sides(
    padding: int | tuple[int, ...] | str, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[int, int, int, int]:
    """Return the padding as ``(top, bottom, left, right)``; ``"same"`` has the odd one below and to the right.

    Sizes are ``(vertical, horizontal)``, or ``(horizontal,)`` of one dimension, which is padded left and right.
    """
    if not isinstance(padding, str):
        before = after = sides("padding", padding, len(kernel), least=0)
    elif padding == "valid":
        before = after = (0,) * len(kernel)
    elif padding != "same":
        raise InputError(
            f"padding is {padding!r}; it must be an int, a pair of ints, 'same' or 'valid'", parameter="padding"
        )
    elif set(stride) != {1}:
        raise InputError(f"padding='same' is not defined for stride {stride}; give the padding as numbers")
    else:
        total = [space * (side - 1) for space, side in zip(dilation, kernel, strict=True)]
        before, after = tuple(both // 2 for both in total), tuple(both - both // 2 for both in total)
    (top, left), (bottom, right) = two(before, 0), two(after, 0)
    return top, bottom, left, right


def two(size: tuple[int, ...], row: int) -> tuple[int, int]:
    """Return a size as ``(vertical, horizontal)``; of one dimension, which is a single row, with ``row`` before it."""
    vertical, horizontal = (row, *size)[-2:]
    return vertical, horizontal
