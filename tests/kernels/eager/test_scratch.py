"""The scratch that the eager kernels declare: what it bounds, and that no result depends on it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from sparsekern.kernels import eager
from sparsekern.kernels.eager import chunks
from torch import Tensor

from tests.kernels.calls import AnyCase, Calls, directions, small_conv, small_layer
from tests.memory import allocations
from tests.oracle import Case, random_case
from tests.oracle_conv2d import ConvCase, conv_case

calls = Calls(eager)
check = calls.check


@pytest.mark.parametrize("scratch", [1, 1000, 3000, 10_000, 100_000, 200_000])
def test_the_result_does_not_depend_on_the_scratch(scratch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From one token, or one row of one image, and one block at a time to everything at once."""
    monkeypatch.setattr(chunks, "SCRATCH_BYTES", scratch)
    for block in ((1, 1), (4, 8), (16, 16), (7, 3)):
        for seed, dtype in enumerate((torch.float32, torch.bfloat16)):
            check(random_case(seed, block=block, tokens=33, dtype=dtype))
    for seed in range(20):
        check(conv_case(seed))


@pytest.mark.parametrize("scratch", [1, 2000, 3000, 50_000])
def test_scores_do_not_depend_on_the_scratch(scratch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "SCRATCH_BYTES", scratch)
    for block in ((1, 1), (4, 3)):
        calls.check_scores(random_case(2, block=block, tokens=33, dtype=torch.float32))
    for seed in range(5):
        calls.check_scores(conv_case(seed))


def test_a_layer_whose_single_token_exceeds_the_scratch_still_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "SCRATCH_BYTES", 1000)
    check(random_case(0, block=(16, 16), rows=30, cols=30, blocks=40, free=2, tokens=5, dtype=torch.float32))


def big_layer(block: tuple[int, int], out_features: int, in_features: int, dtype: torch.dtype) -> Case:
    rows, cols = -(-out_features // block[0]), -(-in_features // block[1])
    sizes = {"rows": rows, "cols": cols, "out_features": out_features, "in_features": in_features}
    return small_layer(block, blocks=max(1, rows * cols // 10), free=0, tokens=1000, dtype=dtype, **sizes)


def big_conv(dtype: torch.dtype, **given: object) -> ConvCase:
    settings = {"block": (16, 16), "groups": 1, "height": 32, "width": 32, "images": 2, "blocks": 9, "free": 0}
    return small_conv(**{**settings, "dtype": dtype, **given})


PRODUCTS = (calls.fwd, calls.dx, calls.dvalues)
SCORES = (
    calls.all_norms,
    lambda case: calls.chosen_norms(case, case.row.clamp(min=0), case.col.clamp(min=0)),
    lambda case: calls.sketch(case, *directions(case, 4)),
)
BIG = [
    (partial(big_layer, (32, 32), 512, 512), PRODUCTS + SCORES),
    (partial(big_layer, (32, 32), 1000, 64), PRODUCTS + SCORES),  # the sums are most of what a panel holds ...
    (partial(big_layer, (32, 32), 64, 1000), PRODUCTS + SCORES),  # ... or the filled up input
    (partial(big_layer, (16, 128), 500, 1021), PRODUCTS + SCORES),  # what is gathered is wider than the sums
    (partial(big_layer, (128, 16), 1021, 500), PRODUCTS + SCORES),
    (partial(big_layer, (1, 1), 60, 70), PRODUCTS + SCORES),
    (partial(big_conv, group_out=64, group_in=64), PRODUCTS + SCORES),
    (partial(big_conv, group_out=64, group_in=60, height=30, width=34), PRODUCTS + SCORES),
    (partial(big_conv, group_out=100, group_in=20), PRODUCTS),
    (partial(big_conv, group_out=20, group_in=100), PRODUCTS),
    (partial(big_conv, group_out=64, group_in=64, stride=(2, 2)), PRODUCTS),
    (partial(big_conv, group_out=64, group_in=16, dilation=(2, 2), padding=(2, 2, 2, 2)), PRODUCTS),
    (partial(big_conv, group_out=16, group_in=16, groups=4), PRODUCTS),
    (partial(big_conv, group_out=48, group_in=16, kernel=(5, 5), padding=(2, 2, 2, 2), blocks=20), PRODUCTS),
    (partial(big_conv, group_out=16, group_in=16, block=(1, 1), blocks=300), PRODUCTS),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("make", "kernels"), BIG)
def test_the_scratch_stays_within_what_is_declared(
    make: Callable[..., AnyCase],
    kernels: tuple[Callable[[AnyCase], Tensor], ...],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Several panels and several chunks of blocks, in a scratch made small to keep the test so."""
    monkeypatch.setattr(chunks, "SCRATCH_BYTES", 2**20)
    case = make(dtype=dtype)
    for number, kernel in enumerate(kernels):
        beside = allocations(lambda kernel=kernel: kernel(case)).peak - kernel(case).nbytes
        assert beside <= chunks.SCRATCH_BYTES, f"function {number}: {beside}"
