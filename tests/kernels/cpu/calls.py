"""Calls of the native kernels by the case, of a linear layer or of a convolution, and cases for them."""

from __future__ import annotations

from typing import Any

import torch
from sparsekern.kernels import cpu
from torch import Tensor

from tests.kernels.calls import NAN, AnyCase, Calls, ints  # noqa: F401  for the tests of this folder
from tests.oracle import Case, random_case
from tests.oracle_conv2d import ConvCase, conv_case

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SQUARES = ((1, 1), (16, 16), (32, 32), (64, 64), (128, 128))
PLAIN = {"dtype": torch.float32, "x_layout": "contiguous", "dy_layout": "contiguous"}


def negated(x: Tensor) -> Tensor:
    """The same numbers as a view of memory that holds them with the other sign."""
    view = torch.complex(torch.zeros(()), -x).conj().imag
    assert view.is_neg() and torch.equal(view, x)
    return view


calls = Calls(cpu)
kernels, fwd, dx, dvalues, backward = calls.kernels, calls.fwd, calls.dx, calls.dvalues, calls.backward
results, all_norms, chosen_norms, sketch = calls.results, calls.all_norms, calls.chosen_norms, calls.sketch
check = calls.check


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """To the bit, and in the same dtypes."""
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def check_backward_is_dx_and_dvalues(case: AnyCase) -> None:
    """To the bit, and the same in a call that finds the scratch of another one."""
    expected = dx(case), dvalues(case)
    for _ in range(2):
        assert_same(backward(case), expected)


# Cases.


def small_case(**given: Any) -> Case:
    """5 x 4 blocks of 16 x 32 with an edge on both sides, 9 of them stored, and 2 free slots."""
    settings = {"rows": 5, "cols": 4, "out_features": 70, "in_features": 125, "blocks": 9, "free": 2, "tokens": 7}
    return random_case(0, **{**settings, "block": (16, 32), "bias": True, **PLAIN, **given})


def with_block(block: tuple[int, int], **given: Any) -> Case:
    return small_case(
        **{"block": block, "out_features": 5 * block[0], "in_features": 4 * block[1], "tokens": 40, **given}
    )


def large_case(block: tuple[int, int], **given: Any) -> Case:
    """Enough work for several threads, panels of tokens and groups of block rows, with an edge on both sides."""
    out_features, in_features = (97, 105) if block == (1, 1) else (299, 307)
    rows, cols = -(-out_features // block[0]), -(-in_features // block[1])
    settings = {"rows": rows, "cols": cols, "out_features": out_features, "in_features": in_features}
    settings |= {"blocks": max(1, rows * cols // 2), "free": 3, "tokens": 300, "bias": True}
    return random_case(1, block=block, **{**settings, **PLAIN, **given})


def small_conv(**given: Any) -> ConvCase:
    """3x3, 2 groups, 2 x (9 * 2) blocks of 16 x 32 with an edge in every tap and group, 20 stored, 2 free slots."""
    settings = {"kernel": (3, 3), "stride": (1, 1), "dilation": (1, 1), "padding": (1, 1, 1, 1), "groups": 2}
    settings |= {"group_out": 23, "group_in": 39, "height": 5, "width": 6, "images": 3, "blocks": 20, "free": 2}
    return conv_case(0, **{**settings, "block": (16, 32), "dtype": torch.float32, "bias": True, **given})


def conv_with_block(block: tuple[int, int], **given: Any) -> ConvCase:
    """2 x (9 * 2) blocks and their edges, of any size."""
    return small_conv(**{"block": block, "group_out": block[0] + 3, "group_in": block[1] + 5, **given})
