"""What the convolution kernels must compute: torch's own convolution in float64 with a masked dense weight.

The checks are those of :mod:`tests.oracle`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from sparsekern.kernels.contract import ConvShape
from torch import Tensor
from torch.nn.functional import conv2d, pad

from sparsekern.ops import Probe
from sparsekern.ops import conv2d as ops_conv2d
from sparsekern.topology import conv_grid
from tests.oracle import DTYPES, F64, GARBAGE, Case

BLOCKS = ((1, 1), (2, 3), (4, 4), (1, 5), (5, 2), (8, 16), (16, 8), (16, 16), (32, 32), (16, 32))
KERNELS = ((3, 3), (3, 3), (1, 1), (1, 3), (5, 3), (2, 2), (7, 7))

# The oracle.


def _place(shape: ConvShape, block: tuple[int, int], r: int, c: int) -> tuple[slice, slice, int, int]:
    """Return where block ``(r, c)`` lies in a weight ``(Cout, Cin / groups, kh, kw)``."""
    (bo, bi), group_out, group_in = block, shape.out_channels // shape.groups, shape.in_channels // shape.groups
    group, rb = divmod(r, -(-group_out // bo))
    tap, cb = divmod(c, -(-group_in // bi))
    first = group * group_out + rb * bo
    out = slice(first, min(first + bo, (group + 1) * group_out))
    return out, slice(cb * bi, min((cb + 1) * bi, group_in)), tap // shape.kernel[1], tap % shape.kernel[1]


def conv_weight(values: Tensor, row: Tensor, col: Tensor, shape: ConvShape) -> Tensor:
    """Return the float64 weight ``(Cout, Cin / groups, kh, kw)``: each stored block at its place, zero elsewhere."""
    weight = torch.zeros(shape.out_channels, shape.in_channels // shape.groups, *shape.kernel, dtype=F64)
    for block, r, c in zip(values, row.tolist(), col.tolist(), strict=True):
        if r >= 0:
            out, channels, i, j = _place(shape, (values.shape[1], values.shape[2]), r, c)
            place = weight[out, channels, i, j]
            place.copy_(block[: place.shape[0], : place.shape[1]])
    return weight


def conv_blocks(weight: Tensor, row: Tensor, col: Tensor, block: tuple[int, int], shape: ConvShape) -> Tensor:
    """Return ``(Z, bo, bi)``: what a dense weight holds at each slot; zero in free slots and phantom."""
    values = weight.new_zeros(len(row), *block)
    for value, r, c in zip(values, row.tolist(), col.tolist(), strict=True):
        if r >= 0:
            out, channels, i, j = _place(shape, block, r, c)
            place = weight[out, channels, i, j]
            value[: place.shape[0], : place.shape[1]] = place
    return values


def dense_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, shape: ConvShape) -> Tensor:
    """Return torch's convolution with padding on four sides."""
    top, bottom, left, right = shape.padding
    x = pad(x, (left, right, top, bottom))
    return conv2d(x, weight, bias, shape.stride, 0, shape.dilation, shape.groups)


def dense_gradients(dy: Tensor, x: Tensor, weight: Tensor, shape: ConvShape) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of the dense weight, by torch's own backward."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = dense_conv2d(x, weight, None, shape)
    dx, dweight = torch.autograd.grad(y, (x, weight), dy)
    return dx, dweight


# Cases.


@dataclass(frozen=True)
class ConvCase(Case):
    """One convolution with the numbers that go through it; x and dy are channels last."""

    shape: ConvShape

    @property
    def geometry(self) -> ConvShape:
        return self.shape

    @property
    def size(self) -> tuple[int, int]:
        return self.x.shape[2], self.x.shape[3]

    def op(self, x: Tensor, values: Tensor, bias: Tensor | None, probe: Probe | None = None) -> Tensor:
        return ops_conv2d(x, values, bias, self.index, self.grid, self.shape, probe)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return dense_conv2d(x, weight, bias, self.shape)

    def gradients(self, dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return dense_gradients(dy, x, weight, self.shape)

    def gradient(self, dy: Tensor, x: Tensor) -> Tensor:
        return dense_gradients(dy, x, torch.zeros_like(self.weight, dtype=x.dtype), self.shape)[1]

    def blocks_at(self, gradient: Tensor, row: Tensor, col: Tensor) -> Tensor:
        return conv_blocks(gradient, row, col, self.grid.block, self.shape)

    def scaled(self, gradient: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return gradient * u.view(-1, 1, 1, 1) * v.view(1, *self.shape.kernel, -1).permute(0, 3, 1, 2)

    @property
    def terms_of_y(self) -> Tensor:
        return self.stored.sum((1, 2, 3))[:, None, None]

    @property
    def terms_of_dx(self) -> Tensor:
        by_group = self.stored.unflatten(0, (self.shape.groups, -1)).sum((1, 3, 4))  # (groups, Cin / groups)
        return by_group.flatten()[:, None, None]

    def dense(self, values: Tensor) -> Tensor:
        return conv_weight(values, self.row, self.col, self.shape)


def conv_case(seed: int, **given: Any) -> ConvCase:
    """Draw a case from a seed; what is ``given`` is not drawn.

    Args:
        seed: of everything.
        given: any of ``block``, ``kernel``, ``stride``, ``dilation``, ``padding`` (four sides), ``groups``,
            ``group_out`` and ``group_in`` (channels of a group), ``height``, ``width``, ``images``, ``blocks``
            (stored), ``free`` (slots), ``dtype``, ``values_dtype``, ``bias``.
    """
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def pick(name: str, choices: Any) -> Any:
        drawn = draw.choice(choices)  # always drawn, so that what is given does not change the rest
        return given.pop(name, drawn)

    bo, bi = pick("block", BLOCKS)
    kh, kw = pick("kernel", KERNELS)
    stride = pick("stride", ((1, 1), (1, 1), (2, 2), (3, 3), (1, 2), (2, 3)))
    dilation = pick("dilation", ((1, 1), (1, 1), (2, 2), (1, 3)))
    reach = dilation[0] * (kh - 1), dilation[1] * (kw - 1)
    same = (reach[0] // 2, reach[0] - reach[0] // 2, reach[1] // 2, reach[1] - reach[1] // 2)
    padding = pick("padding", ((0, 0, 0, 0), (1, 1, 1, 1), same, same, (2, 0, 1, 3)))
    groups = pick("groups", (1, 1, 1, 2, 3, 5))
    most = 9 if max(bo, bi) <= 5 else 40
    group_out = pick("group_out", range(1, most + 1) if groups == 1 else range(1, most // 2))
    group_in = pick("group_in", range(1, most + 1) if groups == 1 else range(1, most // 2))
    shape = ConvShape(groups * group_in, groups * group_out, (kh, kw), stride, padding, dilation, groups)
    least = max(1, reach[0] + 1 - padding[0] - padding[1]), max(1, reach[1] + 1 - padding[2] - padding[3])
    height, width = pick("height", range(least[0], least[0] + 7)), pick("width", range(least[1], least[1] + 7))
    images = pick("images", (0, 1, 1, 2, 3))
    grid = conv_grid(shape.in_channels, shape.out_channels, shape.kernel, (bo, bi), groups)
    blocks = pick("blocks", range(1, grid.cells + 1))
    free = pick("free", (0, 0, 1, 3))
    dtype = pick("dtype", DTYPES)
    values_dtype = given.pop("values_dtype", dtype)
    bias = pick("bias", (True, False))
    if given:
        raise TypeError(f"unknown: {', '.join(given)}")

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=F64)

    cells = torch.randperm(grid.cells, generator=generator)[:blocks].int()
    order = torch.randperm(blocks + free, generator=generator)  # slots are in no order, free ones between
    row, col = (torch.cat([c, c.new_full((free,), -1)])[order] for c in (cells // grid.cols, cells % grid.cols))
    values = normal(blocks + free, bo, bi)
    real = conv_blocks(torch.ones(shape.out_channels, group_in, kh, kw), row, col, (bo, bi), shape)
    values[real == 0] = GARBAGE
    out_size = shape.output_size(height, width)
    return ConvCase(
        shape=shape,
        grid=grid,
        row=row,
        col=col,
        x=channels_last(normal(images, height, width, shape.in_channels).to(dtype)),
        values=values.to(values_dtype),
        bias=normal(shape.out_channels).to(values_dtype) if bias else None,
        dy=channels_last(normal(images, *out_size, shape.out_channels).to(dtype)),
    )


def channels_last(x: Tensor) -> Tensor:
    """Return ``(N, H, W, C)`` as ``(N, C, H, W)``."""
    return x.permute(0, 3, 1, 2)
