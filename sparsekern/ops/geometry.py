"""A geometry as it goes through an op's schema, and the layout of the tensors that its kernels read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsekern.kernels.contract import ConvShape, Geometry, LinearShape


def pack(geometry: Geometry) -> list[int]:
    """Return the numbers of a geometry in their order, for a schema: 2 of a linear layer, 13 of a convolution."""
    if isinstance(geometry, LinearShape):
        return [geometry.in_features, geometry.out_features]
    return [
        geometry.in_channels,
        geometry.out_channels,
        *geometry.kernel,
        *geometry.stride,
        *geometry.padding,
        *geometry.dilation,
        geometry.groups,
    ]


def unpack(numbers: Sequence[int]) -> Geometry:
    """Return the geometry that :func:`pack` packed."""
    if len(numbers) == 2:
        return LinearShape(numbers[0], numbers[1])
    in_channels, out_channels, kh, kw, sh, sw, top, bottom, left, right, dh, dw, groups = numbers
    return ConvShape(in_channels, out_channels, (kh, kw), (sh, sw), (top, bottom, left, right), (dh, dw), groups)


def channels_last(x: Tensor) -> Tensor:
    """Return images ``x (N, C, H, W)`` with ``x.permute(0, 2, 3, 1)`` contiguous: x itself if they are so, else a copy.

    The tokens ``(T, F)`` of a linear layer may have any strides and are returned as they are.
    """
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def as_tokens(x: Tensor) -> Tensor:
    """Return ``(T, F)``, a view: the pixels of images that are channels last, or the tokens of a linear layer."""
    return x.permute(0, 2, 3, 1).flatten(0, 2) if x.dim() == 4 else x
