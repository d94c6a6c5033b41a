"""Calls of the native linear kernels by the case, and cases for them."""

from __future__ import annotations

import torch
from sparsekern.kernels import cpu
from torch import Tensor

from tests.oracle import Case, random_case

NAN = float("nan")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SQUARES = ((1, 1), (16, 16), (32, 32), (64, 64), (128, 128))
PLAIN = {"dtype": torch.float32, "x_layout": "contiguous", "dy_layout": "contiguous"}


def ints(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def fwd(case: Case) -> Tensor:
    return cpu.linear.fwd(case.x, case.values, case.bias, case.index, case.geometry)


def dx(case: Case) -> Tensor:
    return cpu.linear.dx(case.dy, case.values, case.index, case.geometry)


def dvalues(case: Case, dtype: torch.dtype | None = None) -> Tensor:
    return cpu.linear.dvalues(case.dy, case.x, case.index, case.grid.block, case.geometry, dtype or case.values.dtype)


def backward(case: Case) -> tuple[Tensor, Tensor]:
    return cpu.linear.backward(case.dy, case.x, case.values, case.index, case.geometry)


def check_backward_is_dx_and_dvalues(case: Case) -> None:
    """To the bit, and the same in a call that finds the scratch of another one."""
    expected = dx(case), dvalues(case)
    for _ in range(2):
        found = backward(case)
        assert [t.dtype for t in found] == [case.dy.dtype, case.values.dtype]
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def small_case(**given: object) -> Case:
    """5 x 4 blocks of 16 x 32 with an edge on both sides, 9 of them stored, and 2 free slots."""
    settings = {"rows": 5, "cols": 4, "out_features": 70, "in_features": 125, "blocks": 9, "free": 2, "tokens": 7}
    settings |= {"block": (16, 32), "dtype": torch.float32, "bias": True}
    settings |= {"x_layout": "contiguous", "dy_layout": "contiguous"}
    return random_case(0, **{**settings, **given})


def large_case(block: tuple[int, int], **given: object) -> Case:
    """Enough work for several threads, panels of tokens and groups of block rows, with an edge on both sides."""
    out_features, in_features = (97, 105) if block == (1, 1) else (299, 307)
    rows, cols = -(-out_features // block[0]), -(-in_features // block[1])
    settings = {"rows": rows, "cols": cols, "out_features": out_features, "in_features": in_features}
    settings |= {"blocks": max(1, rows * cols // 2), "free": 3, "dtype": torch.float32, "tokens": 300}
    settings |= {"bias": True, "x_layout": "contiguous", "dy_layout": "contiguous"}
    return random_case(1, block=block, **{**settings, **given})


def with_block(block: tuple[int, int], **given: object) -> Case:
    return small_case(block=block, out_features=5 * block[0], in_features=4 * block[1], **given)
