"""The grid of blocks that a weight is cut into."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from sparsekern.errors import InputError
from sparsekern.topology.arguments import check_whole, whole_sides


@dataclass(frozen=True)
class Grid:
    """A weight of ``out_features x in_features`` elements cut into blocks ``(bo, bi)``.

    The last block row and the last block column may extend beyond the matrix; the elements outside are *phantom* and
    never counted.

    The weight of a convolution is the matrix ``Cout x (kh*kw*Cin/groups)`` with columns in (tap, channel) order. It is
    cut into block columns within each tap and into block rows within each group, so the last ones of *each* may extend
    beyond. In one dimension the kernel has one side, and ``kh`` is 1. Use :func:`conv_grid` to make such a grid.

    Args:
        out_features: rows of the matrix, 1 or more; a multiple of ``groups``.
        in_features: columns of the matrix, 1 or more; a multiple of the taps ``kh * kw``.
        block: rows and columns of a block, 1 or more each.
        kernel: ``(kh, kw)`` of a convolution, ``(kw,)`` in one dimension; None for a linear layer.
        groups: groups of a convolution.
        transposed: whether the dense weight of a linear layer is ``(in, out)``, as in GPT-2. Blocks do not change.

    Raises:
        TypeError: a size is not a whole number.
        ValueError: a size is below 1 or not a multiple as above, or there are 2**31 cells or more (indices are int32).
    """

    out_features: int
    in_features: int
    block: tuple[int, int]
    kernel: tuple[int, ...] | None = None
    groups: int = 1
    transposed: bool = False

    def __post_init__(self) -> None:
        for name in ("out_features", "in_features"):
            size = check_whole(name, getattr(self, name), 1)
            object.__setattr__(self, name, size)  # the schema of an op takes no integer of NumPy
        groups = check_whole("groups", self.groups)
        object.__setattr__(self, "groups", groups)
        object.__setattr__(self, "block", tuple(check_whole("block_size", side) for side in self.block))
        if self.kernel is not None:
            object.__setattr__(self, "kernel", tuple(check_whole("kernel_size", side) for side in self.kernel))
        if min(self.kernel or (1,)) < 1:
            raise InputError(f"kernel_size is {self.kernel}; it must be 1 or more each way", parameter="kernel_size")
        check_whole("groups", groups, 1)
        for name, parts, what in (("out_features", self.groups, "groups"), ("in_features", self.taps, "taps")):
            if getattr(self, name) % parts:
                raise InputError(
                    f"{name} is {getattr(self, name)}; it must be a multiple of the {parts} {what}", parameter=name
                )
        if len(self.block) != 2 or min(self.block) < 1:
            raise InputError(
                f"block_size is {self.block}; it must be an int or a pair (out, in), 1 or more each",
                parameter="block_size",
            )
        if self.cells >= 2**31:
            raise InputError(
                f"block_size is {self.block}, which cuts {self.out_features} x {self.in_features} into {self.cells} "
                "cells; there must be fewer than 2**31: use larger blocks",
                parameter="block_size",
            )

    @property
    def taps(self) -> int:
        """The number of taps kh * kw; 1 for a linear layer."""
        return 1 if self.kernel is None else math.prod(self.kernel)

    @property
    def group_out(self) -> int:
        """The rows of the matrix in one group."""
        return self.out_features // self.groups

    @property
    def tap_in(self) -> int:
        """The columns of the matrix in one tap: the input channels of one group."""
        return self.in_features // self.taps

    @property
    def group_rows(self) -> int:
        """The block rows RB of one group; block row ``r`` is row ``r % RB`` of group ``r // RB``."""
        return -(-self.group_out // self.block[0])

    @property
    def tap_cols(self) -> int:
        """The block columns CB of one tap; block column ``c`` is column ``c % CB`` of tap ``c // CB``."""
        return -(-self.tap_in // self.block[1])

    @property
    def rows(self) -> int:
        """The number of block rows R."""
        return self.groups * -(-self.out_features // (self.groups * self.block[0]))

    @property
    def cols(self) -> int:
        """The number of block columns C."""
        taps = self.taps
        return taps * -(-self.in_features // (taps * self.block[1]))

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of PyTorch's dense weight: ``(out, in)``, ``(Cout, Cin / groups, kh, kw)`` or ``(..., kw)``."""
        if self.kernel is not None:
            return self.out_features, self.tap_in, *self.kernel
        return (self.in_features, self.out_features) if self.transposed else (self.out_features, self.in_features)

    @property
    def cells(self) -> int:
        """The number of cells R * C."""
        return self.rows * self.cols

    @property
    def numel(self) -> int:
        """The number of elements of the matrix."""
        return self.out_features * self.in_features

    @property
    def has_edge(self) -> bool:
        """Whether some blocks extend beyond the matrix."""
        return bool(self.group_out % self.block[0] or self.tap_in % self.block[1])

    def real_rows(self, row: Tensor) -> Tensor:
        """Return how many rows of a block in block row ``row`` are inside the matrix; 0 for a free slot."""
        return _inside(row, self.group_rows, self.group_out, self.block[0])

    def real_cols(self, col: Tensor) -> Tensor:
        """Return how many columns of a block in block column ``col`` are inside the matrix; 0 for a free slot."""
        return _inside(col, self.tap_cols, self.tap_in, self.block[1])


def _inside(place: Tensor, places: int, size: int, side: int) -> Tensor:
    """Return how much of a block's ``side`` is inside, where the last of each ``places`` covering ``size`` is cut."""
    if size % side == 0:
        return (place >= 0).to(place.dtype).mul_(side)
    inside = (size - place % places * side).clamp_(max=side)
    return inside.masked_fill_(place < 0, 0)


def conv_grid(
    in_channels: int, out_channels: int, kernel: tuple[int, ...], block: tuple[int, int], groups: int = 1
) -> Grid:
    """Return the grid of a convolution.

    Args:
        in_channels, out_channels: multiples of ``groups``.
        kernel: ``(kh, kw)``, or ``(kw,)`` in one dimension.
        block: ``(bo, bi)``, in channels.
        groups: as in :class:`torch.nn.Conv2d`.

    Raises:
        ValueError: as for :class:`Grid`, or ``in_channels`` is not a multiple of ``groups``.
    """
    groups = check_whole("groups", groups)
    in_channels, out_channels = check_whole("in_channels", in_channels), check_whole("out_channels", out_channels)
    for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
        check_whole(name, channels, 1)
        if groups >= 1 and channels % groups:
            raise InputError(f"{name} is {channels}; it must be a multiple of groups = {groups}", parameter=name)
    in_features = in_channels // max(1, groups) * max(1, math.prod(kernel))
    return Grid(out_channels, in_features, block, kernel, groups)


def block_pair(block_size: int | tuple[int, int]) -> tuple[int, int]:
    """Return ``(out, in)`` from ``block_size``, a whole number or a pair; :class:`Grid` checks their range.

    Raises:
        TypeError: ``block_size`` is neither.
    """
    rows, cols = whole_sides("block_size", block_size, 2, "an int or a pair of ints (out, in)")
    return rows, cols
