"""Outputs that leave the L2 caches are written past them: to the bit what a part of the input gives, which is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from sparsekern.kernels import cpu

from tests.oracle import Case, random_case
from tests.oracle_conv2d import ConvCase, conv_case

pytestmark = pytest.mark.usefixtures("instructions")

TOKENS, SOME = 1100, 110
WIDE = (2048, 2064, 2056)
"""Features, 9 MB of float32: whole blocks; a whole cache line at the edge; half a line, and so all by the caches."""


def layer(block: tuple[int, int], out_features: int, in_features: int, dtype: torch.dtype) -> Case:
    rows, cols = -(-out_features // block[0]), -(-in_features // block[1])
    sizes = {"rows": rows, "cols": cols, "out_features": out_features, "in_features": in_features, "tokens": TOKENS}
    plain = {"dtype": dtype, "x_layout": "contiguous", "dy_layout": "contiguous", "bias": True, "free": 1}
    return random_case(0, block=block, blocks=max(rows * cols // 8, 3), **sizes, **plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wide", WIDE)
@pytest.mark.parametrize("block", [(1, 1), (16, 16), (32, 64)])
def test_linear(block: tuple[int, int], wide: int, dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    case = layer(block, wide, 64, dtype)
    y = [cpu.fwd(x, case.values, case.bias, case.index, wide) for x in (case.x, *case.x.split(SOME))]
    assert torch.equal(y[0], torch.cat(y[1:]))
    threads(2)
    assert torch.equal(y[0], cpu.fwd(case.x, case.values, case.bias, case.index, wide))

    threads(1)
    case = layer(block, 64, wide, dtype)
    dx = [cpu.dx(dy, case.values, case.index, wide) for dy in (case.dy, *case.dy.split(SOME))]
    assert torch.equal(dx[0], torch.cat(dx[1:]))
    for count in (1, 2):
        threads(count)
        assert torch.equal(dx[0], cpu.backward(case.dy, case.x, case.values, case.index)[0])


def images(block: tuple[int, int], count: int, size: int, out_channels: int, in_channels: int, stride: int) -> ConvCase:
    plain = {
        "kernel": (3, 3),
        "dilation": (1, 1),
        "padding": (1, 1, 1, 1),
        "free": 1,
        "dtype": torch.float32,
        "bias": True,
    }
    sizes = {"groups": 2, "group_out": out_channels // 2, "group_in": in_channels // 2, "images": count}
    blocks = out_channels * in_channels // (block[0] * block[1])
    return conv_case(0, block=block, blocks=blocks, stride=(stride, stride), height=size, width=size, **sizes, **plain)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("count", "size"), [(36, 32), (560, 8)])  # by rows; images in turn
@pytest.mark.parametrize("block", [(1, 1), (16, 16), (32, 32)])
def test_convolution(
    block: tuple[int, int], count: int, size: int, stride: int, threads: Callable[[int], None]
) -> None:
    """9 MB of y and dx, of 64 channels in two groups."""
    case = images(block, count * stride**2, size, 64, 16, stride)
    y = [
        cpu.conv2d_fwd(x, case.values, case.bias, case.index, case.shape)
        for x in (case.x, *case.x.split(len(case.x) // 12))
    ]
    assert torch.equal(y[0], torch.cat(y[1:]))

    case = images(block, count, size, 16, 64, stride)
    dx = [
        cpu.conv2d_dx(dy, case.values, case.index, case.shape, case.size)
        for dy in (case.dy, *case.dy.split(count // 12))
    ]
    assert torch.equal(dx[0], torch.cat(dx[1:]))
    for number in (1, 2):
        threads(number)
        assert torch.equal(dx[0], cpu.conv2d_backward(case.dy, case.x, case.values, case.index, case.shape)[0])
