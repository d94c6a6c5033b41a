"""Outputs that leave the L2 caches are written past them: to the bit what parts of the input give, which are not.

And gradients of as many tokens take several rounds of packing, whose panels two threads share.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from sparsekern.kernels import cpu

from tests.oracle import Case, random_case
from tests.oracle_conv2d import ConvCase, conv_case

pytestmark = pytest.mark.usefixtures("instructions", "poisoned_memory")

TOKENS, SOME = 1100, 22
"""9 MB of float32 in 2048 features, and 180 KB: more and less than the L2 cache of any processor."""

WIDE = (2048, 2064, 2056)
"""Features: whole blocks; a whole cache line at the edge; half a line, and so all of them through the caches."""


def layer(block: tuple[int, int], out_features: int, in_features: int, dtype: torch.dtype) -> Case:
    rows, cols = -(-out_features // block[0]), -(-in_features // block[1])
    sizes = {"rows": rows, "cols": cols, "out_features": out_features, "in_features": in_features, "tokens": TOKENS}
    plain = {"dtype": dtype, "x_layout": "contiguous", "dy_layout": "contiguous", "bias": True, "free": 1}
    return random_case(0, block=block, blocks=max(rows * cols // 8, 3), **sizes, **plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wide", WIDE)
@pytest.mark.parametrize("block", [(1, 1), (16, 16), (32, 64), (16, 128)])
def test_linear(block: tuple[int, int], wide: int, dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    case = layer(block, wide, 64, dtype)
    y = [cpu.linear.fwd(x, case.values, case.bias, case.index, case.geometry) for x in (case.x, *case.x.split(SOME))]
    assert torch.equal(y[0], torch.cat(y[1:]))
    threads(2)
    assert torch.equal(y[0], cpu.linear.fwd(case.x, case.values, case.bias, case.index, case.geometry))

    threads(1)
    case = layer(block, 64, wide, dtype)
    dx = [cpu.linear.dx(dy, case.values, case.index, case.geometry) for dy in (case.dy, *case.dy.split(SOME))]
    assert torch.equal(dx[0], torch.cat(dx[1:]))
    dvalues = cpu.linear.dvalues(case.dy, case.x, case.index, block, case.geometry, dtype)
    for count in (1, 2):
        threads(count)
        found = cpu.linear.backward(case.dy, case.x, case.values, case.index, case.geometry)
        assert torch.equal(dx[0], found[0]) and torch.equal(dvalues, found[1])


def images(
    block: tuple[int, int], kernel: int, count: int, size: int, out_channels: int, in_channels: int, stride: int
) -> ConvCase:
    """Of two groups."""
    sizes = {"group_out": out_channels // 2, "group_in": in_channels // 2, "height": size, "width": size}
    plain = {"dilation": (1, 1), "padding": (kernel // 2,) * 4, "free": 1, "dtype": torch.float32, "bias": True}
    shape = {"kernel": (kernel, kernel), "stride": (stride, stride), "groups": 2, "images": count}
    blocks = max(out_channels * in_channels * kernel**2 // (6 * block[0] * block[1]), 2)  # of up to 3 times as many
    return conv_case(0, block=block, blocks=blocks, **sizes, **plain, **shape)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("count", "size", "some"), [(36, 32, 1), (570, 8, 15)])  # by rows; images in turn
@pytest.mark.parametrize(("kernel", "wide"), [(3, 64), (3, 96), (1, 64)])  # 96: at blocks of 32 with an edge of a line
@pytest.mark.parametrize("block", [(1, 1), (16, 16), (32, 32)])
def test_convolution(
    block: tuple[int, int],
    kernel: int,
    wide: int,
    count: int,
    size: int,
    some: int,
    stride: int,
    threads: Callable[[int], None],
) -> None:
    """9 MB of y and dx, or more."""
    case = images(block, kernel, count * stride**2, size, wide, 16, stride)
    y = [cpu.conv2d.fwd(x, case.values, case.bias, case.index, case.shape) for x in (case.x, *case.x.split(some))]
    assert torch.equal(y[0], torch.cat(y[1:]))

    case = images(block, kernel, count, size, 16, wide, stride)
    dx = [cpu.conv2d.dx(dy, case.values, case.index, case.shape, case.size) for dy in (case.dy, *case.dy.split(some))]
    assert torch.equal(dx[0], torch.cat(dx[1:]))
    dvalues = cpu.conv2d.dvalues(case.dy, case.x, case.index, block, case.shape, torch.float32)
    for number in (1, 2):
        threads(number)
        found = cpu.conv2d.backward(case.dy, case.x, case.values, case.index, case.shape)
        assert torch.equal(dx[0], found[0]) and torch.equal(dvalues, found[1])
