"""Checks of the convolution's Triton kernels under a given configuration, beside :mod:`tests.gpu_checks`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from sparsekern.kernels import gpu
from sparsekern.kernels.gpu.config import Config, Multiply, Outer, Supertile

from tests.device import DEVICE, huge
from tests.gpu_checks import calls, dvalues, dx, forced, fwd
from tests.kernels.calls import NAN
from tests.oracle import check_dvalues, check_y
from tests.oracle_conv2d import ConvCase, conv_case

GATHER = (Multiply(tile_t=16, tile_k=32, group=2, warps=4, stages=3), Outer(tile_in=32, tile_t=16, warps=4, stages=3))
"""Two blocks of 16 side by side."""
PARTS = (Multiply(tile_t=16, tile_k=16, group=2, warps=4, stages=3), Outer(tile_in=16, tile_t=16, warps=4, stages=3))
"""A part of a block of 32."""
SUPERTILE = Supertile(tile_out=64, tile_in=32, tile_t=16, warps=4, stages=3)

SHAPES: dict[str, dict[str, Any]] = {
    "padded": {},
    "strided": {"stride": (2, 2)},
    "stride over more than the kernel": {"stride": (3, 4), "kernel": (2, 2), "padding": (0, 0, 0, 0)},
    "dilated": {"dilation": (2, 1), "padding": (2, 2, 1, 1)},
    "dilated and strided": {"dilation": (2, 3), "stride": (2, 2), "height": 7, "width": 8},
    "same, on four sides": {"kernel": (2, 4), "padding": (0, 1, 1, 2)},
    "grouped": {"groups": 3, "group_out": 21, "group_in": 19},
    "grouped and strided": {"groups": 2, "group_out": 16, "group_in": 40, "stride": (1, 2)},
    "padding beyond the kernel": {"kernel": (1, 3), "padding": (3, 2, 4, 4)},
}


def edge_case(seed: int = 0, **given: Any) -> ConvCase:
    """Return a 3x3 convolution of 2 images of 5x7 pixels whose last blocks stick out, in slots of no order."""
    block = given.get("block", (16, 16))
    settings = {
        "block": block, "kernel": (3, 3), "stride": (1, 1), "dilation": (1, 1), "padding": (1, 1, 1, 1), "groups": 1,
        "group_out": 2 * block[0] - 11, "group_in": 3 * block[1] - 9, "height": 5, "width": 7, "images": 2,
        "free": 2, "dtype": torch.float32, "bias": True,
    }  # fmt: skip
    return conv_case(seed, **{**settings, **given})


def whole_case(seed: int = 0, **given: Any) -> ConvCase:
    """Return the same without edges: nothing is copied, filled up or cut off."""
    return edge_case(seed, **{"group_out": 32, "group_in": 64, **given})


# One call.


def check_far_pixels() -> None:
    """Raise AssertionError unless a pixel behind the element 2**31 of x is read, for y and for the stored gradient.

    A convolution whose stride leaves out all pixels of an image but its corners.
    """
    side = 2**14
    case = edge_case(
        kernel=(1, 1), padding=(0, 0, 0, 0), stride=(2, 2), group_in=16, group_out=16, height=3, width=3, images=1,
        dtype=torch.float16, free=0, bias=False,
    )  # fmt: skip
    here, shape = case.on(DEVICE), case.shape._replace(stride=(side - 1, side - 1))
    x = huge(side * side * 16).view(1, side, side, 16).permute(0, 3, 1, 2)
    x[:, :, :: side - 1, :: side - 1] = here.x[:, :, ::2, ::2]
    with forced(*GATHER):
        check_y(case, gpu.conv2d.fwd(x, here.values, None, here.index, shape).cpu())
        grad = gpu.conv2d.dvalues(here.dy, x, here.index, case.grid.block, shape, case.values.dtype)
    check_dvalues(case, grad.cpu(), case.values.dtype)


# Checks.


def check_kernels(case: ConvCase, *configs: Config) -> None:
    """Raise AssertionError unless y, dx and the stored gradient are right."""
    with forced(*configs):
        calls.check(case)


def check_that_phantom_elements_are_zero(case: ConvCase, *configs: Config) -> None:
    """Raise AssertionError if a NaN in x and dy reaches the part of a block outside the matrix, or a free slot."""
    broken = replace(case, x=torch.full_like(case.x, NAN), dy=torch.full_like(case.dy, NAN))
    with forced(*configs):
        grad = dvalues(broken)
    real_rows, real_cols = case.grid.real_rows(case.row), case.grid.real_cols(case.col)
    for block, rows, cols in zip(grad.cpu(), real_rows.tolist(), real_cols.tolist(), strict=True):
        assert not block[rows:].any() and not block[:, cols:].any(), "phantom elements are wrong"
        assert block[:rows, :cols].isnan().all()


def check_that_nan_stays_where_it_is_read(case: ConvCase, *configs: Config) -> None:
    """Raise AssertionError if a NaN in a channel of x (of dy) reaches a result that does not read that channel."""
    with forced(*configs):
        bo, bi = case.grid.block
        case = replace(case, bias=None)
        y, grad = fwd(case).cpu(), dx(case).cpu()
        pairs = [
            (r, c % case.grid.tap_cols) for r, c in zip(case.row.tolist(), case.col.tolist(), strict=True) if r >= 0
        ]
        for cb in range(case.grid.tap_cols):
            x = case.x.clone()
            x[:, cb * bi] = NAN
            result = fwd(replace(case, x=x)).cpu()
            unread = [r for r in range(case.grid.rows) if (r, cb) not in pairs]
            for r in unread:
                part = slice(r * bo, (r + 1) * bo)
                assert torch.equal(result[:, part], y[:, part]), f"the NaN of channel block {cb} is in row {r}"
            assert result.isnan().any() or len(unread) == case.grid.rows
        for r in range(case.grid.rows):
            dy = case.dy.clone()
            dy[:, r * bo] = NAN
            result = dx(replace(case, dy=dy)).cpu()
            for cb in range(case.grid.tap_cols):
                part = slice(cb * bi, (cb + 1) * bi)
                if (r, cb) not in pairs:
                    assert torch.equal(result[:, part], grad[:, part]), f"the NaN of row {r} is in channel block {cb}"
