"""The windows of a convolution over some output rows, in a small copy of the padded input.

No matrix of all windows (im2col) is made: the copy holds every pixel once, cut into blocks of channels, and a block of
the weight names the pixels that it reads by their number in it.
"""

from __future__ import annotations

import torch
from sparsekern.kernels.contract import ConvShape
from sparsekern.kernels.eager.chunks import Panel
from torch import Tensor


class Windows:
    """Output rows of some images, and the part of the padded input below them: the *buffer*.

    The buffer is ``(n, height, width, groups, CB * bi)``, the channels of each group filled up to whole blocks.

    Args:
        shape: of the convolution.
        size: ``(H, W)`` of its input.
        panel: output rows; at least one.
        side: channels of a block, ``bi``.
    """

    def __init__(self, shape: ConvShape, size: tuple[int, int], panel: Panel, side: int) -> None:
        self.shape, self.size, self.side = shape, size, side
        self.images, self.rows = slice(panel.n0, panel.n1), panel.r1 - panel.r0
        self.count, self.width_out = panel.n1 - panel.n0, shape.output_size(*size)[1]
        (kh, kw), (sh, sw), (dh, dw) = shape.kernel, shape.stride, shape.dilation
        top, _, left, _ = shape.padding
        self.first_row, self.first_col = panel.r0 * sh - top, -left  # of the buffer, in the input
        self.height = (self.rows - 1) * sh + (kh - 1) * dh + 1
        self.width = (self.width_out - 1) * sw + (kw - 1) * dw + 1
        self.cols = shape.block_cols(side)

    @property
    def tokens(self) -> int:
        """T, the pixels of the output rows."""
        return self.count * self.rows * self.width_out

    def empty(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a buffer of zeros."""
        size = (self.count, self.height, self.width, self.shape.groups, self.cols * self.side)
        return torch.zeros(size, dtype=dtype, device=like.device)

    def load(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the buffer filled from ``x (N, Cin, H, W)``, zero in the padding and behind each group."""
        buffer = self.empty(x, dtype)
        here, there = self._overlap(0, self.size[0])
        if here is not None:
            part = x.permute(0, 2, 3, 1)[(self.images, *there)].unflatten(3, (self.shape.groups, -1))
            buffer[(slice(None), *here)][..., : self.shape.group_in] = part
        return buffer

    def store(self, buffer: Tensor, dx: Tensor, rows: tuple[int, int]) -> None:
        """Write what the buffer holds of the input's ``rows`` into ``dx (N, Cin, H, W)``."""
        here, there = self._overlap(*rows)
        if here is not None:
            part = dx.permute(0, 2, 3, 1)[(self.images, *there)].unflatten(3, (self.shape.groups, -1))
            part.copy_(buffer[(slice(None), *here)][..., : self.shape.group_in])

    def gather(self, buffer: Tensor, group: Tensor, col: Tensor) -> Tensor:
        """Return ``(k, T, bi)``: what a block of ``group[k]`` in block column ``col[k]`` sees at every output pixel."""
        pixels = (self._block_offsets(group, col)[:, None] + self._pixel_offsets(buffer.device)).flatten()
        blocks = buffer.view(-1, self.side).index_select(0, pixels)
        return blocks.view(group.shape[0], self.tokens, self.side)

    def tap(self, buffer: Tensor, number: int) -> Tensor:
        """Return a view ``(n, rows, Wo, groups, CB * bi)``: what tap ``number`` sees at every output pixel."""
        (_, kw), (sh, sw), (dh, dw) = self.shape.kernel, self.shape.stride, self.shape.dilation
        i, j = divmod(number, kw)
        below, right = i * dh + (self.rows - 1) * sh + 1, j * dw + (self.width_out - 1) * sw + 1
        return buffer[:, i * dh : below : sh, j * dw : right : sw]

    def _overlap(self, r0: int, r1: int) -> tuple[tuple[slice, slice] | None, tuple[slice, slice]]:
        """Return where the input's rows ``r0`` to ``r1`` are in the buffer and in the input; None if nowhere."""
        top, bottom = max(self.first_row, r0), min(self.first_row + self.height, r1)
        left, right = max(self.first_col, 0), min(self.first_col + self.width, self.size[1])
        there = slice(top, bottom), slice(left, right)
        if top >= bottom or left >= right:
            return None, there
        here = (
            slice(top - self.first_row, bottom - self.first_row),
            slice(left - self.first_col, right - self.first_col),
        )
        return here, there

    def _pixel_offsets(self, device: torch.device) -> Tensor:
        """Return ``(T,)``: where the window of each output pixel begins, in blocks of channels."""
        (sh, sw), cells = self.shape.stride, self.shape.groups * self.cols

        def steps(count: int, step: int) -> Tensor:
            return torch.arange(count, device=device) * step

        image = steps(self.count, self.height * self.width)[:, None, None]
        pixel = image + steps(self.rows, sh * self.width)[:, None] + steps(self.width_out, sw)
        return pixel.flatten() * cells

    def _block_offsets(self, group: Tensor, col: Tensor) -> Tensor:
        """Return ``(k,)``: how far into the window a block's channels are, in blocks of channels."""
        (_, kw), (dh, dw) = self.shape.kernel, self.shape.dilation
        tap, channel = col.long() // self.cols, col.long() % self.cols
        pixel = tap // kw * (dh * self.width) + tap % kw * dw
        return (pixel * self.shape.groups + group.long()) * self.cols + channel


def buffer_bytes(shape: ConvShape, size: tuple[int, int], side: int, itemsize: int) -> tuple[int, int]:
    """Return the bytes of a buffer per output row, and those per image that do not depend on the number of rows."""
    (kh, kw), (sh, sw), (dh, dw) = shape.kernel, shape.stride, shape.dilation
    width = (shape.output_size(*size)[1] - 1) * sw + (kw - 1) * dw + 1
    row = width * shape.groups * shape.block_cols(side) * side * itemsize
    return sh * row, ((kh - 1) * dh + 1) * row


def one_tap(shape: ConvShape, number: int) -> ConvShape:
    """Return the convolution whose only tap sees what tap ``number`` of ``shape`` does: 1x1, its padding moved.

    The padding may become negative, which leaves rows or columns of x out.
    """
    (kh, kw), (dh, dw), (top, bottom, left, right) = shape.kernel, shape.dilation, shape.padding
    i, j = divmod(number, kw)
    padding = (top - i * dh, bottom - (kh - 1 - i) * dh, left - j * dw, right - (kw - 1 - j) * dw)
    return shape._replace(kernel=(1, 1), padding=padding, dilation=(1, 1))
