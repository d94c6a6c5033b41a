"""What the convolution kernels must compute: torch's own convolution in float64 with a masked dense weight.

Beside :mod:`tests.oracle`, with the same tolerance. :func:`check_conv` is what every backend is given.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from sparsekern.kernels.contract import ConvShape, Index, accumulate_dtype
from torch import Tensor
from torch.nn.functional import conv2d, pad

from sparsekern.ops import conv2d as ops_conv2d
from sparsekern.topology import Grid, Topology, build_index, conv_grid
from tests.oracle import DTYPES, F64, GARBAGE, assert_within, moved

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
class ConvCase:
    """One convolution with the numbers that go through it; x and dy are channels last."""

    shape: ConvShape
    grid: Grid
    row: Tensor
    col: Tensor
    x: Tensor
    values: Tensor
    bias: Tensor | None
    dy: Tensor

    @property
    def geometry(self) -> ConvShape:
        return self.shape

    @property
    def index(self) -> Index:
        return build_index(Topology(self.grid, self.row, self.col))

    @property
    def size(self) -> tuple[int, int]:
        return self.x.shape[2], self.x.shape[3]

    def on(self, device: str) -> ConvCase:
        """Return the case with its tensors on a device, in the same layout; checks want the one on the CPU."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: moved(tensor, device) for name, tensor in tensors.items()})

    @property
    def weight(self) -> Tensor:
        """The exact weight as a kernel reads it: rounded to the compute dtype."""
        return conv_weight(self.values.to(self.x.dtype), self.row, self.col, self.shape)

    @property
    def stored(self) -> Tensor:
        """``(Cout, Cin / groups, kh, kw)``: 1 where an element is stored, else 0."""
        return conv_weight(torch.ones_like(self.values), self.row, self.col, self.shape)


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


def with_slots_reordered(case: ConvCase, order: Tensor) -> ConvCase:
    """Return the same weight with its blocks in other slots: slot ``order[z]`` becomes slot ``z``."""
    return replace(case, row=case.row[order], col=case.col[order], values=case.values[order])


# The tolerance.


def check_conv_y(case: ConvCase, y: Tensor, products: float = 0.0) -> None:
    """Raise AssertionError unless ``y`` is the convolution."""
    weight, dtype = case.weight, case.x.dtype
    bias = None if case.bias is None else case.bias.to(F64)
    exact = dense_conv2d(case.x.to(F64), weight, bias, case.shape)
    magnitude = dense_conv2d(case.x.to(F64).abs(), weight.abs(), None if bias is None else bias.abs(), case.shape)
    peer = dense_conv2d(case.x, weight.to(dtype), None if bias is None else bias.to(dtype), case.shape)
    terms = case.stored.sum((1, 2, 3))[:, None, None]
    assert_within("y", y, exact, peer, magnitude, terms, dtype, products=products)


def check_conv_dx(case: ConvCase, dx: Tensor, products: float = 0.0) -> None:
    """Raise AssertionError unless ``dx`` is the gradient of x."""
    weight, dtype, x, dy = case.weight, case.dy.dtype, case.x.to(F64), case.dy.to(F64)
    exact, _ = dense_gradients(dy, x, weight, case.shape)
    magnitude, _ = dense_gradients(dy.abs(), x, weight.abs(), case.shape)
    peer, _ = dense_gradients(case.dy, case.x, weight.to(dtype), case.shape)
    by_group = case.stored.unflatten(0, (case.shape.groups, -1)).sum((1, 3, 4))  # (groups, Cin / groups)
    assert_within("dx", dx, exact, peer, magnitude, by_group.flatten()[:, None, None], dtype, products=products)


def check_conv_dvalues(case: ConvCase, dvalues: Tensor, dtype: torch.dtype, products: float = 0.0) -> None:
    """Raise AssertionError unless ``dvalues`` are the stored blocks of the weight's gradient in ``dtype``."""
    wide = torch.promote_types(case.x.dtype, dtype)  # an output wider than the input is compared with a wide dense op
    weight = torch.zeros_like(case.weight)

    def blocks(dy: Tensor, x: Tensor) -> Tensor:
        _, gradient = dense_gradients(dy, x, weight.to(x.dtype), case.shape)
        return conv_blocks(gradient, case.row, case.col, case.grid.block, case.shape)

    dy, x = case.dy.to(F64), case.x.to(F64)
    exact, magnitude = blocks(dy, x), blocks(dy.abs(), x.abs())
    peer = blocks(case.dy.to(wide), case.x.to(wide)).to(dtype)
    # oneDNN's bfloat16 gradient of some dilated kernels reads memory that nobody wrote (torch 2.13): no peer there.
    peer = torch.where(peer.isfinite(), peer, exact.to(dtype))
    terms = torch.tensor(float(dy.shape[0] * dy.shape[2] * dy.shape[3]))
    assert_within("dvalues", dvalues, exact, peer, magnitude, terms, dtype, accumulate_dtype(case.x.dtype), products)


def check_conv(backend: ModuleType, case: ConvCase, device: str = "cpu", products: float = 0.0) -> None:
    """Raise AssertionError unless the three convolution kernels of a backend give what the oracle says."""
    here, shape, dtype = case.on(device), case.shape, case.values.dtype
    index = here.index
    y = backend.conv2d.fwd(here.x, here.values, here.bias, index, shape)
    check_conv_y(case, y, products)
    dx = backend.conv2d.dx(here.dy, here.values, index, shape, case.size)
    check_conv_dx(case, dx, products)
    for name, result in (("y", y), ("dx", dx)):
        assert result.permute(0, 2, 3, 1).is_contiguous(), f"{name} is not channels last: {result.stride()}"
    dvalues = backend.conv2d.dvalues(here.dy, here.x, index, case.grid.block, shape, dtype)
    check_conv_dvalues(case, dvalues, dtype, products)
    both = backend.conv2d.backward(here.dy, here.x, here.values, index, shape)
    assert all(torch.equal(a, b) for a, b in zip(both, (dx, dvalues), strict=True)), "backward differs from its halves"
    assert both[0].stride() == dx.stride() and both[1].dtype == dtype


def check_conv_op(case: ConvCase, device: str = "cpu") -> None:
    """Raise AssertionError unless ``sparsekern.ops.conv2d`` and its backward give what the oracle says."""
    here = case.on(device)
    x, values = here.x.detach().requires_grad_(), here.values.detach().requires_grad_()
    bias = None if here.bias is None else here.bias.detach().requires_grad_()
    y = ops_conv2d(x, values, bias, here.index, case.grid, case.shape)
    check_conv_y(case, y.detach())
    y.backward(here.dy)
    assert x.grad is not None and values.grad is not None
    check_conv_dx(case, x.grad)
    check_conv_dvalues(case, values.grad, values.dtype)
    if bias is not None:
        assert bias.grad is not None
        dy = case.dy.to(F64)
        pixels = torch.tensor(float(dy.shape[0] * dy.shape[2] * dy.shape[3]))
        exact, magnitude = dy.sum((0, 2, 3)), dy.abs().sum((0, 2, 3))
        assert_within("dbias", bias.grad, exact, case.dy.sum((0, 2, 3)), magnitude, pixels, bias.dtype)
