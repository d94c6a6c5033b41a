"""The products of the eager kernels, of linear layers and of convolutions: by hand and by the oracle.

What they share with the native kernels is in :mod:`tests.kernels.test_products`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from sparsekern.kernels import eager
from sparsekern.kernels.contract import ConvShape, LinearShape

from sparsekern.topology import Grid, Topology, build_index, conv_grid
from tests.kernels.calls import NAN, AnyCase, Calls, full, ints, small_conv, small_layer
from tests.oracle import (
    DTYPES,
    DY_LAYOUTS,
    X_LAYOUTS,
    random_case,
)
from tests.oracle_conv2d import conv_case

calls = Calls(eager)
fwd, dx, dvalues, check = calls.fwd, calls.dx, calls.dvalues, calls.check

# By hand.


def test_a_layer_of_three_blocks_by_hand() -> None:
    """Blocks of 1 x 2 in a weight of 3 x 4; slot 1 is free, and the second row is empty.

    5 6 1 2
    . . . .
    . . 3 4
    """
    shape, index = LinearShape(4, 3), build_index(Topology(Grid(3, 4, (1, 2)), ints(0, -1, 2, 0), ints(1, -1, 1, 0)))
    values = torch.tensor([[[1.0, 2]], [[99, 99]], [[3, 4]], [[5, 6]]])
    x = torch.tensor([[1.0, 2, 3, 4], [1, 0, 0, 0]])
    dy = torch.tensor([[1.0, 10, 100], [2, 0, 0]])

    assert eager.linear.fwd(x, values, None, index, shape).tolist() == [[28, 0, 25], [5, 0, 0]]
    assert eager.linear.fwd(x, values, torch.tensor([0.5, 7, 0]), index, shape).tolist() == [[28.5, 7, 25], [5.5, 7, 0]]
    assert eager.linear.dx(dy, values, index, shape).tolist() == [[5, 6, 301, 402], [10, 12, 2, 4]]
    grad = eager.linear.dvalues(dy, x, index, (1, 2), shape, torch.float32)
    assert grad.tolist() == [[[3, 4]], [[0, 0]], [[300, 400]], [[3, 2]]]


def test_an_edge_block_by_hand() -> None:
    """One block of 2 x 2 in a weight of 1 x 1: three quarters of it are phantom."""
    shape, index = LinearShape(1, 1), build_index(Topology(Grid(1, 1, (2, 2)), ints(0), ints(0)))
    values, x, dy = torch.tensor([[[2.0, 0], [0, 0]]]), torch.tensor([[3.0], [5]]), torch.tensor([[1.0], [10]])

    assert eager.linear.fwd(x, values, torch.tensor([1.0]), index, shape).tolist() == [[7], [11]]
    assert eager.linear.dx(dy, values, index, shape).tolist() == [[2], [20]]
    assert eager.linear.dvalues(dy, x, index, (2, 2), shape, torch.float32).tolist() == [[[53, 0], [0, 0]]]


def test_a_row_of_three_taps_by_hand() -> None:
    """A kernel of 1 x 3 over 2 channels in blocks of 1 x 2: taps 0 and 2 are stored, slot 1 is free.

    1 2 | . . | 3 4

    Pixels (1 10), (2 20), (3 30); y is left . (1 2) + right . (3 4), and beyond the edge is zero.
    """
    shape = ConvShape(2, 1, (1, 3), padding=(0, 0, 1, 1))
    index = build_index(Topology(conv_grid(2, 1, (1, 3), (1, 2)), ints(0, -1, 0), ints(2, -1, 0)))
    values = torch.tensor([[[3.0, 4]], [[99, 99]], [[1, 2]]])
    x = torch.tensor([[[[1.0, 2, 3]], [[10, 20, 30]]]]).contiguous(memory_format=torch.channels_last)
    dy = torch.tensor([[[[1.0, 10, 100]]]])

    y = eager.conv2d.fwd(x, values, torch.tensor([0.5]), index, shape)
    dx = eager.conv2d.dx(dy, values, index, shape, (1, 3))
    dvalues = eager.conv2d.dvalues(dy, x, index, (1, 2), shape, torch.float32)

    assert y.tolist() == [[[[86.5, 150.5, 42.5]]]]  # 2*3+20*4, 1+20+9+120, 2+40
    assert dx.tolist() == [[[[10, 103, 30]], [[20, 204, 40]]]]  # from the right (1 2), from the left (3 4)
    assert dvalues.tolist() == [[[32, 320]], [[0, 0]], [[210, 2100]]]  # 2*1 + 3*10; 1*10 + 2*100


def test_a_stride_by_hand() -> None:
    """Every second pixel of five, kernel 1 x 1 of value 2: three outputs; the skipped pixels get no gradient."""
    shape = ConvShape(1, 1, (1, 1), stride=(1, 2))
    index = build_index(Topology(conv_grid(1, 1, (1, 1), (1, 1)), ints(0), ints(0)))
    values, x = torch.tensor([[[2.0]]]), torch.tensor([[[[1.0, 2, 3, 4, 5]]]])

    assert eager.conv2d.fwd(x, values, None, index, shape).tolist() == [[[[2, 6, 10]]]]
    dx = eager.conv2d.dx(torch.tensor([[[[1.0, 10, 100]]]]), values, index, shape, (1, 5))
    assert dx.tolist() == [[[[2, 0, 20, 0, 200]]]]


def test_groups_share_block_columns_but_not_channels() -> None:
    """Two groups of one channel, kernel 1 x 1: block (0, 0) multiplies channel 0, block (1, 0) channel 1."""
    shape = ConvShape(2, 2, (1, 1), groups=2)
    index = build_index(Topology(conv_grid(2, 2, (1, 1), (1, 1), groups=2), ints(0, 1), ints(0, 0)))
    values, x = torch.tensor([[[2.0]], [[3.0]]]), torch.tensor([[[[1.0]], [[10]]]])

    assert eager.conv2d.fwd(x, values, None, index, shape).flatten().tolist() == [2, 30]
    assert eager.conv2d.dx(x, values, index, shape, (1, 1)).flatten().tolist() == [2, 30]
    assert eager.conv2d.dvalues(x, x, index, (1, 1), shape, torch.float32).flatten().tolist() == [1, 100]


# Against the oracle.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [(1, 1), (4, 4), (16, 16), (3, 7), (64, 16)])
@pytest.mark.parametrize("draw", [partial(random_case, tokens=19), partial(conv_case, images=2)], ids=["", "conv2d"])
def test_all_blocks_and_dtypes(draw: Callable[..., AnyCase], block: tuple[int, int], dtype: torch.dtype) -> None:
    check(draw(11, block=block, dtype=dtype))


@pytest.mark.parametrize("tokens", [0, 1, 63, 64, 65])
@pytest.mark.parametrize("block", [(1, 1), (4, 4)])
def test_any_number_of_tokens(block: tuple[int, int], tokens: int) -> None:
    check(random_case(12, block=block, tokens=tokens, dtype=torch.float32))


@pytest.mark.parametrize("images", [0, 1, 5])
def test_any_number_of_images(images: int) -> None:
    check(small_conv(images=images))


@pytest.mark.parametrize("dy_layout", DY_LAYOUTS)
@pytest.mark.parametrize("x_layout", X_LAYOUTS)
def test_any_strides(x_layout: str, dy_layout: str) -> None:
    check(small_layer(x_layout=x_layout, dy_layout=dy_layout))
    check(small_layer(x_layout=x_layout, dy_layout=dy_layout, out_features=20, in_features=16))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 3), (2, 1)])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (1, 3), (5, 3), (2, 2), (7, 7)])
def test_kernels_strides_and_groups(kernel: tuple[int, int], stride: tuple[int, int], groups: int) -> None:
    for dilation, padding in (((1, 1), (0, 0, 0, 0)), ((1, 1), (1, 1, 1, 1)), ((2, 2), (2, 3, 1, 0))):
        given = {"kernel": kernel, "stride": stride, "groups": groups, "dilation": dilation, "padding": padding}
        reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        check(small_conv(height=reach[0] + 4, width=reach[1] + 3, blocks=3, **given))


@pytest.mark.parametrize("seed", range(12))
def test_random_convolutions(seed: int) -> None:
    for case in range(20 * seed, 20 * seed + 20):
        check(conv_case(case))


def test_depthwise() -> None:
    check(small_conv(groups=9, group_in=1, group_out=1, blocks=60, block=(1, 1)))
    check(small_conv(groups=5, group_in=1, group_out=2, blocks=30, block=(4, 4)))


def test_an_image_smaller_than_the_kernel() -> None:
    check(small_conv(kernel=(7, 7), padding=(3, 3, 3, 3), height=2, width=1, blocks=70))
    check(small_conv(kernel=(3, 3), dilation=(4, 4), padding=(4, 4, 4, 4), height=1, width=2))


def test_pixels_that_no_window_sees_have_no_gradient() -> None:
    """Stride 3, kernel 1: two of three pixels; and a rest at the end that the last window does not reach."""
    check(small_conv(kernel=(1, 1), stride=(3, 3), padding=(0, 0, 0, 0), height=9, width=8, blocks=5))
    case = small_conv(kernel=(2, 2), stride=(4, 4), padding=(0, 0, 0, 0), height=9, width=9)
    check(case)
    assert not dx(case)[:, :, 6:].any()


def test_dvalues_of_half_precision_inputs_keep_the_precision_of_their_sums() -> None:
    """1 + 2**-13 is no float16 number; the sum of its two parts must not have been one on the way."""
    case = random_case(0, block=(1, 1), rows=1, cols=1, blocks=1, free=0, tokens=2, dtype=torch.float16)
    case = replace(case, x=torch.ones(2, 1).half(), dy=torch.tensor([[1.0], [2**-13]]).half())

    assert dvalues(case, torch.float32).item() == 1 + 2**-13


def test_sums_over_many_inputs_are_not_formed_in_half_precision() -> None:
    """4096 ones in float16: a float16 sum would stop at 2048."""
    index = build_index(Topology(Grid(1, 4096, (1, 16)), ints(*[0] * 256), ints(*range(256))))
    x, ones = torch.ones(1, 4096).half(), torch.ones(256, 1, 16).half()

    assert eager.linear.fwd(x, ones, None, index, LinearShape(4096, 1)).item() == 4096


def test_a_nan_in_dy_reaches_only_the_gradients_of_its_row() -> None:
    case = full(small_layer)
    dy = case.dy.clone()
    dy[3, 5] = NAN  # the second row of block row 1

    grad, clean = dvalues(replace(case, dy=dy)), dvalues(case)

    assert grad[(case.row == 1) & (case.col < 3), 1].isnan().all()
    assert torch.equal(grad[case.row != 1], clean[case.row != 1])
    assert torch.equal(grad[case.row == 1][:, [0, 2, 3]], clean[case.row == 1][:, [0, 2, 3]])
