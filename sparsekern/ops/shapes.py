"""How the sizes of a convolution go through an op's schema, and the layout that its kernels read."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekern.kernels.contract import ConvShape


def pack_shape(shape: ConvShape) -> list[int]:
    """Return the 13 numbers of a shape, in its order: a schema knows lists of ints."""
    return [
        shape.in_channels,
        shape.out_channels,
        *shape.kernel,
        *shape.stride,
        *shape.padding,
        *shape.dilation,
        shape.groups,
    ]


def unpack_shape(numbers: list[int]) -> ConvShape:
    """Return the shape that :func:`pack_shape` packed."""
    in_channels, out_channels, kh, kw, sh, sw, top, bottom, left, right, dh, dw, groups = numbers
    return ConvShape(in_channels, out_channels, (kh, kw), (sh, sw), (top, bottom, left, right), (dh, dw), groups)


def channels_last(x: Tensor) -> Tensor:
    """Return ``x (N, C, H, W)`` with ``x.permute(0, 2, 3, 1)`` contiguous: itself where that is so, else a copy."""
    return x.contiguous(memory_format=torch.channels_last)
