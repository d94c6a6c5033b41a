"""The interface of the kernels: the functions that every backend implements, and the data that they read.

One letter per axis, used in all kernels and their tests:

    T  tokens: the rows of x, all leading dimensions flattened
    O  out features, cut into R block rows of ``bo``        R = ceil(O / bo)
    I  in features, cut into C block columns of ``bi``      C = ceil(I / bi)
    Z  slots: stored blocks, free ones included

    x       (T, I)        the compute dtype: float16 | bfloat16 | float32 | float64, any strides
    dy      (T, O)        the compute dtype, any strides (autograd passes expanded views)
    values  (Z, bo, bi)   any floating dtype, rounded to the compute dtype when read
    y       (T, O)        the compute dtype, contiguous; sums in float32 (float64 for float64)

When ``bo`` does not divide O (or ``bi`` I), the last block row (column) sticks out. The part of a block outside the
matrix is *phantom*: ``dvalues`` writes zeros there, and its contents affect no result as long as they are finite.

A slot that is in no block row is free. Free slots are in no list of the index, and ``dvalues`` writes zeros there.

A convolution multiplies by the matrix ``O x (kh*kw*I)`` of each group, ``I = Cin / groups``, with columns in (tap,
channel) order; tap ``(i, j)`` is number ``i * kw + j``. Its tokens are the pixels of y:

    N, H, W     images, and the rows and columns of x      Ho, Wo  the rows and columns of y: ConvShape.output_size
    CB          block columns of one tap, ceil(Cin / groups / bi); C = kh * kw * CB and c = tap * CB + cb
    RB          block rows of one group, ceil(Cout / groups / bo); R = groups * RB and r = group * RB + rb

    x   (N, Cin, H, W)     the compute dtype, channels last: ``x.permute(0, 2, 3, 1)`` is contiguous
    dy  (N, Cout, Ho, Wo)  likewise; so are y and dx, which the kernels allocate

A block at ``(r, c)`` reads the channels from ``group * Cin / groups + cb * bi`` on: the group only offsets the channel.
The last block of each tap and of each group may stick out; that part is phantom.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

Lists = tuple[Tensor, Tensor, Tensor]
"""Half of an index: where each block row (column) begins, and the block column (row) and slot of each entry."""

PADDING = 16
"""Zero entries behind every list of an :class:`Index`, so that a kernel may read one group ahead."""


class Index(NamedTuple):
    """The places of the stored blocks, by block row (for the forward) and by block column (for the input gradient).

    All int32 and contiguous. ``Z`` entries each, then :data:`PADDING` zeros; entries from ``row_ptr[R]`` on belong to
    free slots.

    There are many blocks of 1x1, so their index is limited to 16 bytes per value: ``row_col`` and ``col_row`` are then
    the topology's own ``col`` and ``row``, *by slot* and without padding, and entry ``e`` of block row ``r`` is in
    block column ``row_col[row_slot[e]]``. :func:`entry_columns` and :func:`entry_rows` hide the difference.
    """

    row_ptr: Tensor
    """(R + 1,): block row ``r`` holds entries ``row_ptr[r]`` to ``row_ptr[r + 1]`` of the next two lists."""
    row_col: Tensor
    """(Z + PADDING,): block column of each entry, ascending within a block row."""
    row_slot: Tensor
    """(Z + PADDING,): slot of each entry in ``values``."""
    col_ptr: Tensor
    """(C + 1,): as ``row_ptr``, for block columns."""
    col_row: Tensor
    """(Z + PADDING,): block row of each entry, ascending within a block column."""
    col_slot: Tensor
    """(Z + PADDING,): slot of each entry in ``values``."""

    @property
    def slots(self) -> int:
        """Z, the number of slots."""
        return self.row_slot.shape[0] - PADDING

    @property
    def by_row(self) -> Lists:
        """``row_ptr``, ``row_col`` and ``row_slot``."""
        return self[:3]

    @property
    def by_col(self) -> Lists:
        """``col_ptr``, ``col_row`` and ``col_slot``."""
        return self[3:]


class LinearShape(NamedTuple):
    """The geometry of a linear layer: all sizes except the number of tokens."""

    in_features: int
    out_features: int

    @property
    def op(self) -> str:
        """The name of the op: ``"linear"``."""
        return "linear"

    def cells(self, block: tuple[int, int]) -> tuple[int, int]:
        """Return ``(R, C)``."""
        return -(-self.out_features // block[0]), -(-self.in_features // block[1])


class ConvShape(NamedTuple):
    """The geometry of a convolution: all sizes except those of its input."""

    in_channels: int
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Zeros around x: top, bottom, left, right. ``"same"`` with an even kernel needs one more on one side."""
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def op(self) -> str:
        """The name of the op: ``"conv2d"``."""
        return "conv2d"

    @property
    def taps(self) -> int:
        """kh * kw."""
        return self.kernel[0] * self.kernel[1]

    @property
    def group_in(self) -> int:
        """Input channels of one group."""
        return self.in_channels // self.groups

    @property
    def group_out(self) -> int:
        """Output channels of one group."""
        return self.out_channels // self.groups

    @property
    def is_pointwise(self) -> bool:
        """Whether every pixel goes through one and the same matrix: a linear layer on a view."""
        return self.taps == self.groups == 1 and self.stride == (1, 1) and not any(self.padding)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Return ``(Ho, Wo)``; below 1 where the kernel does not fit into the padded input."""
        top, bottom, left, right = self.padding
        (kh, kw), (sh, sw), (dh, dw) = self.kernel, self.stride, self.dilation
        return (height + top + bottom - dh * (kh - 1) - 1) // sh + 1, (
            width + left + right - dw * (kw - 1) - 1
        ) // sw + 1

    def block_rows(self, bo: int) -> int:
        """Return RB, the block rows of one group."""
        return -(-self.group_out // bo)

    def block_cols(self, bi: int) -> int:
        """Return CB, the block columns of one tap."""
        return -(-self.group_in // bi)

    def cells(self, block: tuple[int, int]) -> tuple[int, int]:
        """Return ``(R, C)``."""
        return self.groups * self.block_rows(block[0]), self.taps * self.block_cols(block[1])


Geometry = LinearShape | ConvShape
Shape = TypeVar("Shape", LinearShape, ConvShape, contravariant=True)


class Kernels(Protocol[Shape]):
    """The functions of a backend for one geometry, as a module. Read those of ``kernels/eager`` first."""

    def fwd(self, x: Tensor, values: Tensor, bias: Tensor | None, index: Index, geometry: Shape) -> Tensor:
        """Return ``y = x W' + bias``. An empty block row yields the bias."""

    def dx(self, dy: Tensor, values: Tensor, index: Index, geometry: Shape, size: tuple[int, ...]) -> Tensor:
        """Return ``dx = dy W``. An empty block column yields zeros.

        ``size`` is what x has behind its first two axes: ``(H, W)`` of a convolution, nothing of a linear layer.
        """

    def dvalues(
        self, dy: Tensor, x: Tensor, index: Index, block: tuple[int, int], geometry: Shape, dtype: torch.dtype
    ) -> Tensor:
        """Return the stored blocks of the weight's gradient ``dy' x`` as ``(Z, bo, bi)`` of ``dtype``."""

    def backward(self, dy: Tensor, x: Tensor, values: Tensor, index: Index, geometry: Shape) -> tuple[Tensor, Tensor]:
        """Return ``dx`` and ``dvalues`` (of the dtype of ``values``): both gradients of a layer at once."""

    def block_norms(
        self, dy: Tensor, x: Tensor, row: Tensor, col: Tensor, block: tuple[int, int], geometry: Shape
    ) -> Tensor:
        """Return the Frobenius norms ``(K,)`` of the blocks ``(row[k], col[k])`` of the weight's gradient."""

    def all_block_norms(self, dy: Tensor, x: Tensor, block: tuple[int, int], geometry: Shape) -> Tensor:
        """Return the Frobenius norms ``(R, C)`` of all blocks of the weight's gradient, which is never stored."""

    def sketch(self, dy: Tensor, x: Tensor, u: Tensor, v: Tensor, block: tuple[int, int], geometry: Shape) -> Tensor:
        """Return ``(r, R, C)``: ``u[q]' G v[q]`` block by block, G being the weight's gradient.

        ``u`` is ``(r, O)`` and ``v`` ``(r, I)``; of a convolution ``(r, Cout)`` and ``(r, kh*kw*Cin/groups)``.
        """


class Backend(Protocol):
    """A package of kernels."""

    def why_not(self, op: str, device: torch.device, dtype: torch.dtype, block: tuple[int, int]) -> str | None:
        """Return None if the backend can run ``op`` on such tensors, otherwise the reason as part of a sentence."""

    def kernels(self, geometry: Geometry) -> Kernels[Any]:
        """Return the module whose kernels run this geometry."""


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums of ``dtype`` are formed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def ordered_bits(scores: Tensor) -> Tensor:
    """Return a copy of floats that are 0 or more, or infinite, as integers of the same order.

    Minus infinity becomes a negative integer. PyTorch sorts integers ten times as fast as floats on a CPU.
    """
    return scores.contiguous().view(torch.int64 if scores.element_size() == 8 else torch.int32).clone()


def is_finite(tensor: Tensor) -> bool:
    """Return whether all elements are finite, without a temporary of the tensor's size; synchronises the device."""
    if tensor.numel() == 0:
        return True
    low, high = tensor.aminmax()
    return bool(torch.isfinite(low) & torch.isfinite(high))


def new_output(x: Tensor, geometry: Geometry) -> Tensor:
    """Return an uninitialised y for an input x, in the layout that kernels write."""
    if isinstance(geometry, LinearShape):
        return x.new_empty(x.shape[0], geometry.out_features)
    images, _, height, width = x.shape
    return x.new_empty(images, *geometry.output_size(height, width), geometry.out_channels).permute(0, 3, 1, 2)


def new_input(dy: Tensor, geometry: Geometry, size: Sequence[int]) -> Tensor:
    """Return an uninitialised dx for a gradient dy, in the layout that kernels write.

    The ``size`` is ``(H, W)`` for images, and not read for a linear layer.
    """
    if isinstance(geometry, LinearShape):
        return dy.new_empty(dy.shape[0], geometry.in_features)
    return dy.new_empty(dy.shape[0], size[0], size[1], geometry.in_channels).permute(0, 3, 1, 2)


def entry_columns(index: Index, block: tuple[int, int], start: int, stop: int) -> Tensor:
    """Return the block columns of entries ``start`` to ``stop`` of the row lists; any valid one for a free slot."""
    if block == (1, 1):
        return index.row_col.index_select(0, index.row_slot[start:stop]).clamp_(min=0)
    return index.row_col[start:stop]


def entry_rows(index: Index, block: tuple[int, int], start: int, stop: int) -> Tensor:
    """Return the block rows of entries ``start`` to ``stop`` of the column lists; any valid one for a free slot."""
    if block == (1, 1):
        return index.col_row.index_select(0, index.col_slot[start:stop]).clamp_(min=0)
    return index.col_row[start:stop]
