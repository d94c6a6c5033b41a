"""The sparse drop-in replacements for torch.nn.Conv2d and torch.nn.Conv1d."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F

from sparsekern import ops
from sparsekern.errors import InputError
from sparsekern.kernels.contract import ConvShape
from sparsekern.nn.block_sparse import BlockSparse, check_topology_and_dtype
from sparsekern.nn.converters import register_converter
from sparsekern.nn.linear import default_block_size
from sparsekern.topology import Grid, Topology, block_pair, conv_grid
from sparsekern.topology.arguments import check_choice, check_whole, whole_sides


class SparseConv2d(BlockSparse):
    """Convolution with a block-sparse weight: only some blocks of the kernel are stored.

    The weight is cut into blocks of output channels by input channels, within each tap and each group. Input and output
    are dense. Forward, backward and the optimizer hold only the stored blocks, never a dense weight or weight gradient.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype:
            as in :class:`torch.nn.Conv2d`.
        sparsity: as in :class:`SparseLinear`.
        block_size: side of the blocks, or ``(out, in)``, in channels. Need not divide the channel counts. Default: 32
            on a CPU, 64 on CUDA, but no larger than a group's channels need (16 at least).
        blocks, capacity, init, init_scale, topology, seed, name: as in :class:`SparseLinear`.
        tie_taps: store a block of channels in all taps or in none. ``blocks`` counts the blocks of all taps.

    Raises:
        ValueError: a size, sparsity or count is out of range, ``init`` or ``padding_mode`` is unknown, or taps are to
            be tied and the blocks are not the same in all of them.
        TypeError: a size is neither an int nor a pair of ints.

    Shape:
        input ``(N, Cin, H, W)`` or ``(Cin, H, W)``, output ``(N, Cout, Ho, Wo)`` or ``(Cout, Ho, Wo)``. The native
        memory format is channels last: other inputs are copied to it, and the output is channels last.

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
        check_topology_and_dtype(topology, dtype)
        check_choice("padding_mode", padding_mode, ("zeros", "reflect", "replicate", "circular"))
        kernel, steps, spacing = (
            sides(size_name, size, self.dimensions)
            for size_name, size in (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation))
        )
        around = four_sides(padding, kernel, steps, spacing)
        sizes = {"in_channels": in_channels, "out_channels": out_channels, "kernel_size": kernel, "groups": groups}
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
            tie_taps=tie_taps,
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

    @staticmethod
    def grid_for(
        arguments: dict[str, Any], block_size: int | tuple[int, int] | None, device: torch.device | str | None
    ) -> Grid:
        """Return the grid of a layer with these constructor arguments; None takes the device's default block size.

        The default is limited to what the channels of a group need, rounded up to a power of two, 16 at least.
        """
        names = ("in_channels", "out_channels", "kernel_size", "groups")
        in_channels, out_channels, kernel, groups = (arguments[name] for name in names)
        if block_size is not None:
            return conv_grid(in_channels, out_channels, kernel, block_pair(block_size), groups)
        usual, groups = default_block_size(device), check_whole("groups", groups)
        rows, cols = (
            min(usual, max(16, 1 << (check_whole(name, channels) // max(1, groups) - 1).bit_length()))
            for name, channels in (("out_channels", out_channels), ("in_channels", in_channels))
        )
        return conv_grid(in_channels, out_channels, kernel, (rows, cols), groups)

    def forward(self, input: Tensor | Proxy) -> Tensor:
        """Return the convolution of ``input``; see :func:`sparsekern.ops.conv2d` for the errors."""
        if isinstance(input, Proxy):
            return self.traced(input)
        if self.padding_mode != "zeros":
            input = self._padded(input)
        values, index, probe = self.operands()
        return ops.conv2d(input, values, self.bias, index, self.grid, self.conv_shape, probe)

    def dense_forward(self, input: Tensor, weight: Tensor) -> Tensor:
        """Return the output of PyTorch's convolution with a dense ``weight``, and this layer's sizes and bias."""
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
        parts += ["tie_taps=True"] * self.tie_taps
        return ", ".join([*parts, self._counts_repr()])


class SparseConv1d(SparseConv2d):
    """Convolution in one dimension with a block-sparse weight: only some blocks of the kernel are stored.

    It is computed as a convolution of images with one row, so it takes the arguments of :class:`SparseConv2d`, and
    training methods treat both alike. Sizes are ints or tuples of one int, as in :class:`torch.nn.Conv1d`.

    Raises:
        ValueError: as for :class:`SparseConv2d`.
        TypeError: a size is neither an int nor a tuple of one int.

    Shape:
        input ``(N, Cin, L)`` or ``(Cin, L)``, output ``(N, Cout, Lo)`` or ``(Cout, Lo)``. The native memory format is
        channels last, as of ``x.transpose(1, 2)`` for a contiguous ``(N, L, Cin)``: other inputs are copied to it, and
        the output has it (``flatten`` and ``reshape`` accept it, ``view`` across channels and positions does not).

    Example:
        >>> import sparsekern as sk
        >>> conv = sk.SparseConv1d(64, 128, 5, padding=2, sparsity=0.9, block_size=16)
        >>> conv(torch.randn(8, 64, 100)).shape
        torch.Size([8, 128, 100])
    """

    dense_class = nn.Conv1d
    dimensions = 1

    def forward(self, input: Any) -> Tensor:
        """Return the convolution of ``input``.

        Raises:
            ValueError: the input has another shape, or is shorter than the kernel.
            TypeError: the input is not a tensor, or its dtype is not that of the values.
        """
        if not isinstance(input, Tensor):
            return super().forward(input)
        self._check_input(input)
        return super().forward(input.unsqueeze(-2)).squeeze(-2)

    def _check_input(self, input: Tensor) -> None:
        if input.dim() not in (2, 3) or input.shape[-2] != self.in_channels:
            raise InputError(
                f"input has shape {tuple(input.shape)}; it must be (N, C, L) or (C, L) with C = in_channels = "
                f"{self.in_channels}",
                parameter="input",
            )
        if self.conv_shape.output_size(1, input.shape[-1] + sum(self._around) * (self.padding_mode != "zeros"))[1] < 1:
            raise InputError(
                f"input has shape {tuple(input.shape)}, which is shorter than the kernel {self.kernel_size} with "
                f"dilation {self.dilation} and padding {self._around[2:]} (left, right): use more padding or a longer "
                "input",
                parameter="input",
            )

    def dense_forward(self, input: Tensor, weight: Tensor) -> Tensor:
        """Return the output of PyTorch's convolution with a dense ``weight``, and this layer's sizes and bias."""
        padding: int | str | tuple[int, ...] = self.padding
        if self.padding_mode != "zeros":
            input, padding = self._padded(input.unsqueeze(-2)).squeeze(-2), 0
        return F.conv1d(input, weight, self.bias, self.stride, padding, self.dilation, self.groups)


def conv_arguments(conv: nn.Conv1d | nn.Conv2d | SparseConv2d) -> dict[str, Any]:
    """Return a layer's constructor arguments except device and dtype."""
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return {name: getattr(conv, name) for name in names} | {"bias": conv.bias is not None}


register_converter(nn.Conv2d, SparseConv2d, conv_arguments)
register_converter(nn.Conv1d, SparseConv1d, conv_arguments)


def sides(name: str, size: int | tuple[int, ...], count: int, least: int = 1) -> tuple[int, ...]:
    """Return the ``count`` numbers of a size, the vertical one first, from an int or a tuple.

    Raises:
        TypeError: ``size`` is neither.
        ValueError: a number is below ``least``.
    """
    whole = whole_sides(name, size, count, "an int or a pair of ints" if count == 2 else "an int or a tuple of one")
    if min(whole) < least:
        raise InputError(f"{name} is {size}; it must be {least} or more each way", parameter=name)
    return whole


def four_sides(
    padding: int | tuple[int, ...] | str, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[int, int, int, int]:
    """Return the padding as ``(top, bottom, left, right)``; ``"same"`` puts the odd row or column at the end.

    Sizes are ``(vertical, horizontal)``, or ``(horizontal,)`` in one dimension, which is padded left and right only.
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
        raise InputError(
            f"padding is 'same', which is not defined for stride {stride}; give the padding as numbers",
            parameter="padding",
        )
    else:
        total = [space * (side - 1) for space, side in zip(dilation, kernel, strict=True)]
        before, after = tuple(both // 2 for both in total), tuple(both - both // 2 for both in total)
    (top, left), (bottom, right) = two(before, 0), two(after, 0)
    return top, bottom, left, right


def two(size: tuple[int, ...], row: int) -> tuple[int, int]:
    """Return a size as ``(vertical, horizontal)``; in one dimension ``row`` is the vertical size."""
    vertical, horizontal = (row, *size)[-2:]
    return vertical, horizontal
