"""The native products of linear layers and of convolutions: threads, views, large outputs, on every instruction set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.cpu.calls import (
    DTYPES,
    NAN,
    SQUARES,
    AnyCase,
    assert_same,
    backward,
    check_backward_is_dx_and_dvalues,
    conv_with_block,
    dvalues,
    dx,
    fwd,
    kernels,
    large_case,
    negated,
    results,
    small_case,
    small_conv,
    with_block,
)
from tests.oracle import (
    DY_LAYOUTS,
    X_LAYOUTS,
    random_case,
)
from tests.oracle_conv2d import channels_last

pytestmark = pytest.mark.usefixtures("instructions", "poisoned_memory")

Make = Callable[..., Any]
BLOCKS = ((1, 1), (16, 32))
both = pytest.mark.parametrize("make", [with_block, conv_with_block], ids=["linear", "conv2d"])
of_blocks = pytest.mark.parametrize("block", BLOCKS)


# Dtypes, views, empty parts.


@of_blocks
@both
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_and_device_change_nothing(default: torch.dtype, make: Make, block: tuple[int, int]) -> None:
    case = make(block)
    run, index = kernels(case), case.index  # an index is not made on the device that is the default

    def calls(x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        geometry, values, size = case.geometry, case.values, tuple(x.shape[2:])
        y, grad = run.fwd(x, values, case.bias, index, geometry), run.dx(dy, values, index, geometry, size)
        blocks = run.dvalues(dy, x, index, block, geometry, torch.float32)
        return y, grad, blocks, *run.backward(dy, x, values, index, geometry)

    expected = calls(case.x, case.dy)
    torch.set_default_dtype(default)
    try:
        with torch.device("meta"):
            found, empty = calls(case.x, case.dy), calls(case.x[:0], case.dy[:0])[2]
    finally:
        torch.set_default_dtype(torch.float32)

    assert_same(found, expected)
    assert (empty.dtype, empty.device.type) == (torch.float32, "cpu")


@of_blocks
@both
def test_negated_views_keep_their_sign(make: Make, block: tuple[int, int]) -> None:
    case = make(block)
    views = {name: negated(getattr(case, name)) for name in ("values", "bias")}
    if make is with_block:
        views |= {name: negated(getattr(case, name)) for name in ("x", "dy")}
    else:
        views |= {n: channels_last(negated(getattr(case, n).permute(0, 2, 3, 1).contiguous())) for n in ("x", "dy")}
    assert all(view.is_neg() for view in views.values())
    same = replace(case, **views)

    assert_same((*results(same), *backward(same)), (*results(case), *backward(case)))


# The same bits for any number of threads, any order of slots, and for both gradients at once.


def check_threads(case: AnyCase, threads: Callable[[int], None]) -> None:
    threads(1)
    expected = results(case)
    for count in (1, 2, 3, 2):
        threads(count)
        assert_same(results(case), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [(1, 1), (16, 16), (32, 64), (128, 128)])
def test_threads_and_repeated_calls_change_no_bit(
    block: tuple[int, int], dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    for tokens in (3, 12, 17, 300):
        check_threads(large_case(block, dtype=dtype, tokens=tokens), threads)


@pytest.mark.parametrize("block", [(1, 1), (16, 16), (32, 32)])
@pytest.mark.parametrize(
    "given",
    [{"images": 1}, {"images": 7}, {"images": 7, "stride": (2, 2)}, {"images": 7, "dtype": torch.bfloat16}],
)
@pytest.mark.parametrize("width", [4, 20])
def test_threads_change_no_bit_of_a_convolution(
    block: tuple[int, int], given: dict[str, Any], width: int, threads: Callable[[int], None]
) -> None:
    check_threads(conv_with_block(block, height=16, width=width, blocks=36, groups=1, **given), threads)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("block", [*SQUARES, (128, 16), (16, 64)])
def test_both_gradients_at_once_are_those_of_one_after_the_other(
    block: tuple[int, int], count: int, threads: Callable[[int], None]
) -> None:
    threads(count)
    for dtype in DTYPES:
        for tokens in (1, 17, 300):
            check_backward_is_dx_and_dvalues(large_case(block, dtype=dtype, tokens=tokens))


@pytest.mark.parametrize("dy_layout", DY_LAYOUTS)
def test_both_gradients_at_once_of_any_strides(dy_layout: str) -> None:
    for x_layout in X_LAYOUTS:
        check_backward_is_dx_and_dvalues(small_case(tokens=40, x_layout=x_layout, dy_layout=dy_layout))


# What must not leak: NaN and infinity, phantom elements and free slots.


@of_blocks
@pytest.mark.parametrize("width", [6, 25])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_nan_stays_in_the_windows_that_see_it(
    block: tuple[int, int], width: int, stride: tuple[int, int], dtype: torch.dtype
) -> None:
    """In a corner: what follows it in memory is another row or image."""
    blocks = 36 if block != (1, 1) else 300
    case = conv_with_block(block, width=width, stride=stride, blocks=blocks, dtype=dtype)
    y, grad, blocks_grad = results(case)
    x, dy = case.x.clone(memory_format=torch.channels_last), case.dy.clone(memory_format=torch.channels_last)
    x[1, :, 0, -1] = dy[1, :, 0, -1] = NAN
    with_x, with_dy = results(replace(case, x=x)), results(replace(case, dy=dy))

    for found, allowed in ((with_x[0], 2), (with_dy[1], 4)):
        assert found.isnan().any(3).any(2).any(1).nonzero().flatten().tolist() == [1]
        columns = found[1].isnan().any(0).nonzero()
        assert int(columns[:, 0].max()) <= 1 and int(columns[:, 1].min()) >= found.shape[3] - allowed
    assert grad.shape == with_dy[1].shape
    assert torch.equal(with_x[0][~with_x[0].isnan()], y[~with_x[0].isnan()])
    # A pixel in the top right corner is seen by no window through the lowest row of taps, nor through the left column.
    taps = case.col // case.shape.block_cols(block[1])
    unseen = (case.row >= 0) & ((taps // 3 == 2) if stride == (1, 1) else torch.zeros_like(taps, dtype=torch.bool))
    assert torch.equal(with_x[2][unseen], blocks_grad[unseen])


# Outputs larger than the L2 caches are written past them, with the bits that parts of the input give. Their gradients
# take several rounds of packing, whose panels two threads share.


def check_large(case: AnyCase, of_y: Callable[..., Tensor], some: int) -> None:
    """``of_y``: ``fwd`` or ``dx``, the product whose output is large."""
    parts = zip(case.x.split(some), case.dy.split(some), strict=True)
    assert torch.equal(of_y(case), torch.cat([of_y(replace(case, x=x, dy=dy)) for x, dy in parts]))


def check_large_gradients(case: AnyCase, some: int, threads: Callable[[int], None]) -> None:
    check_large(case, dx, some)
    expected = dx(case), dvalues(case)
    for count in (1, 2):
        threads(count)
        assert_same(backward(case), expected)


def large_linear(block: tuple[int, int], out_features: int, in_features: int, dtype: torch.dtype) -> AnyCase:
    """9 MB of float32 in 1100 x 2048 numbers: more than the L2 cache of any processor."""
    rows, cols = -(-out_features // block[0]), -(-in_features // block[1])
    sizes = {"rows": rows, "cols": cols, "out_features": out_features, "in_features": in_features, "tokens": 1100}
    plain = {"x_layout": "contiguous", "dy_layout": "contiguous", "blocks": max(rows * cols // 8, 3), "free": 1}
    return random_case(0, block=block, dtype=dtype, bias=True, **sizes, **plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wide", [2048, 2064, 2056])  # whole blocks; a cache line at the edge; half a line: not past
@pytest.mark.parametrize("block", [(1, 1), (16, 16), (32, 64), (16, 128)])
def test_large_outputs(block: tuple[int, int], wide: int, dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    case = large_linear(block, wide, 64, dtype)
    check_large(case, fwd, 22)
    y = fwd(case)
    threads(2)
    assert torch.equal(y, fwd(case))
    threads(1)
    check_large_gradients(large_linear(block, 64, wide, dtype), 22, threads)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("count", "size", "some"), [(36, 32, 1), (570, 8, 15)])  # by rows; images in turn
@pytest.mark.parametrize(("kernel", "wide"), [(3, 64), (3, 96), (1, 64)])  # 96: at blocks of 32 with an edge of a line
@pytest.mark.parametrize("block", [(1, 1), (16, 16), (32, 32)])
def test_large_outputs_of_a_convolution(
    block: tuple[int, int],
    kernel: int,
    wide: int,
    count: int,
    size: int,
    some: int,
    stride: int,
    threads: Callable[[int], None],
) -> None:
    """9 MB of y and dx, or more, in two groups."""
    shape = {"kernel": (kernel, kernel), "stride": (stride, stride), "padding": (kernel // 2,) * 4}
    shape |= {"block": block, "height": size, "width": size, "free": 1}
    shape |= {"blocks": max(wide * 16 * kernel**2 // (6 * block[0] * block[1]), 2)}  # of up to 3 times as many
    check_large(small_conv(group_out=wide // 2, group_in=8, images=count * stride**2, **shape), fwd, some)
    check_large_gradients(small_conv(group_out=8, group_in=wide // 2, images=count, **shape), some, threads)
