"""Checks of the Triton kernels under a given configuration: for their own tests, and for the mutations of them.

Small tiles are forced, so that a small layer has several of each kind and a tail of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from sparsekern.kernels import gpu
from sparsekern.kernels.gpu import conv2d, linear, tables  # noqa: F401  loads gpu.conv2d and gpu.linear
from sparsekern.kernels.gpu.config import KINDS, Config, FewTokens, Multiply, Outer, Problem, Supertile
from torch import Tensor

from sparsekern.topology import Topology, build_index
from tests.device import DEVICE, huge
from tests.kernels.calls import NAN, AnyCase, Calls, directions
from tests.oracle import (
    Case,
    all_cells,
    check_dvalues,
    check_dx,
    check_norms,
    check_sketch,
    check_y,
    random_case,
    with_slots_reordered,
)

HOLES = ("......", ".xxxx.", "......", ".xx.x.", "...x..", "......")
"""Stored blocks, block row by block row: empty ones at both ends and between; rows of 1, 3 and 4 blocks."""
CORNERS = ("xx.x", "..x.", "xxxx")
"""The last block row and the last block column hold blocks, which stick out of an unaligned matrix."""


@contextmanager
def forced(*configs: Config) -> Iterator[None]:
    """Run the kernels with these configurations, of which there is at most one of a kind."""
    healthy, by_kind = tables.run, {type(c): c for c in configs}

    def run(problem: Problem, launch: Any, exact: Any) -> None:
        config = by_kind.get(KINDS[problem.kernel])
        healthy(problem, launch, exact) if config is None else launch(config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "run", run)
        yield


def drawn(pattern: Sequence[str], seed: int = 0, **given: Any) -> Case:
    """Return a case whose stored blocks are the ``x`` of a pattern, in slots of no order, 2 free ones between."""
    rows, cols = len(pattern), len(pattern[0])
    settings = {"bias": True, "free": 2, "dtype": torch.float32, "x_layout": "contiguous", "dy_layout": "contiguous"}
    case = random_case(seed, rows=rows, cols=cols, blocks=rows * cols, **{**settings, **given})
    places = zip(case.row.tolist(), case.col.tolist(), strict=True)
    kept = [slot for slot, (r, c) in enumerate(places) if r < 0 or pattern[r][c] == "x"]
    return with_slots_reordered(case, torch.tensor(kept, dtype=torch.int64))


def corners(block: tuple[int, int], **given: Any) -> Case:
    """Return a case of :data:`CORNERS` that ends 11 rows and 9 columns early, inside 16 bytes."""
    sizes = {"out_features": 3 * block[0] - 11, "in_features": 4 * block[1] - 9, "tokens": 37}
    return drawn(CORNERS, **{"block": block, **sizes, **given})


class Product(NamedTuple):
    """One way through the kernels of y and dx: a configuration and a layer that takes it both times."""

    config: Multiply | FewTokens
    block: tuple[int, int]
    tokens: int

    def case(self, pattern: Sequence[str] = CORNERS, **given: Any) -> Case:
        sizes = {"out_features": len(pattern) * self.block[0], "in_features": len(pattern[0]) * self.block[1]}
        return drawn(pattern, **{"block": self.block, "tokens": self.tokens, **sizes, **given})

    def edge_case(self, **given: Any) -> Case:
        return corners(self.block, **{"tokens": self.tokens, **given})


PRODUCTS = {
    "gather": Product(Multiply(tile_t=16, tile_k=32, group=2, warps=4, stages=3), (16, 16), 33),
    "parts": Product(Multiply(tile_t=16, tile_k=16, group=2, warps=4, stages=3), (32, 32), 33),
    "tma": Product(Multiply(tile_t=16, tile_k=32, group=2, warps=4, stages=3, tma=True), (64, 128), 33),
    "few gather": Product(FewTokens(tile_n=16, tile_k=32, warps=2, stages=4), (32, 16), 7),
    "few parts": Product(FewTokens(tile_n=32, tile_k=16, warps=2, stages=4), (32, 32), 19),
}
CUT_PRODUCTS = {
    "gather": Product(Multiply(tile_t=16, tile_k=64, group=2, warps=4, stages=3, cut=2), (32, 32), 33),
    "parts": Product(Multiply(tile_t=16, tile_k=16, group=2, warps=4, stages=3, cut=2), (32, 32), 33),
    "tma": Product(Multiply(tile_t=16, tile_k=32, group=2, warps=4, stages=3, tma=True, cut=2), (64, 128), 33),
}
"""Two programs share a block row."""
OUTERS = {
    "groups": (Outer(tile_in=64, tile_t=16, warps=4, stages=3), (32, 16)),
    "pieces": (Outer(tile_in=16, tile_t=16, warps=4, stages=3), (16, 32)),
}
SUPERTILE = Supertile(tile_out=64, tile_in=32, tile_t=16, warps=4, stages=3)


# One call.

calls = Calls(gpu, DEVICE)
fwd, dx, dvalues = calls.fwd, calls.dx, calls.dvalues


# Checks, of layers and of convolutions.


def check_products(case: AnyCase, *configs: Config) -> None:
    """Raise AssertionError unless y and dx are right."""
    with forced(*configs):
        y, grad = fwd(case), dx(case)
    assert case.size or (y.is_contiguous() and grad.is_contiguous())
    check_y(case, y)
    check_dx(case, grad)


def check_outer(case: AnyCase, *configs: Config, dtype: torch.dtype | None = None) -> None:
    """Raise AssertionError unless the stored gradient is right, its free slots and phantom parts zero."""
    with forced(*configs):
        check_dvalues(case, dvalues(case, dtype), dtype or case.values.dtype)


def norms_in(case: AnyCase, order: Tensor) -> Tensor:
    """Return the norms of all blocks, asked for one by one in this order, sorted again."""
    row, col = all_cells(case)
    return calls.chosen_norms(case, row[order], col[order]).cpu()[order.argsort()]


def check_block_norms(case: AnyCase, *configs: Config) -> None:
    """Raise AssertionError unless the norms of all blocks, asked for one by one in a random order, are right."""
    with forced(*configs):
        norms = norms_in(case, torch.randperm(case.grid.cells, generator=torch.Generator().manual_seed(1)))
    check_norms(case, norms)


def check_all_block_norms(case: AnyCase, *configs: Config) -> None:
    """Raise AssertionError unless the norms of all blocks, asked for at once, are right."""
    with forced(*configs):
        check_norms(case, calls.all_norms(case))


def check_sketches(case: AnyCase, pairs: int = 3) -> None:
    """Raise AssertionError unless sketches of random directions are right."""
    u, v = directions(case, pairs)
    check_sketch(case, calls.sketch(case, u, v), u, v)


def check_that_nan_stays_where_it_is_read(product: Product) -> None:
    """Raise AssertionError if a NaN in a block column of x reaches a block row that stores nothing there; so in dy.

    Each token has its NaN in another block column.
    """
    case = product.case(HOLES)
    across = tuple("".join(column) for column in zip(*HOLES, strict=True))
    with forced(product.config):
        for run, name, side_in, side_out, pattern in (
            (fwd, "x", product.block[1], product.block[0], HOLES),
            (dx, "dy", product.block[0], product.block[1], across),
        ):
            poisoned = getattr(case, name).clone()
            for place in range(len(pattern[0])):
                poisoned[place, place * side_in] = NAN
            clean, result = run(case).cpu(), run(replace(case, **{name: poisoned})).cpu()
            for row, line in enumerate(pattern):
                for token in range(case.x.shape[0]):
                    at = (token, slice(row * side_out, (row + 1) * side_out))
                    if line[token : token + 1] == "x":
                        assert result[at].isnan().all(), f"the NaN of token {token} in {name} is lost in {line}"
                    else:
                        assert torch.equal(result[at], clean[at]), f"the NaN of token {token} in {name} is in {line}"


def check_that_nan_of_a_block_stays_in_its_row(product: Product) -> None:
    """Raise AssertionError if a NaN in a stored block reaches a block row (in dx a column) that does not store it."""
    case = product.case(HOLES)
    with forced(product.config):
        for run, places, side in ((fwd, case.row, product.block[0]), (dx, case.col, product.block[1])):
            clean = run(case).cpu()
            for slot in (case.row >= 0).nonzero().flatten().tolist():
                values = case.values.clone()
                values[slot, 0, 0] = NAN
                result, row = run(replace(case, values=values)).cpu(), int(places[slot])
                others = torch.ones(clean.shape[1], dtype=torch.bool)
                others[row * side : (row + 1) * side] = False
                assert torch.equal(result[:, others], clean[:, others]), f"the NaN of slot {slot} left its row"
                assert result.isnan().any()


def check_that_infinity_stays_infinite(product: Product) -> None:
    """Raise AssertionError unless an infinity in x (in dy) gives what it gives in exact arithmetic: infinities, no NaN.

    It is in the last block of a row, which a tile of K that is not full reads again.
    """
    case = product.case(("xxx", "..x", "xxx"))
    inf, token = float("inf"), case.x.shape[0] - 1
    with forced(product.config):
        for run, name, places in ((fwd, "x", product.block[1]), (dx, "dy", product.block[0])):
            infinite = getattr(case, name).clone()
            infinite[token, infinite.shape[1] - min(places, infinite.shape[1])] = inf
            result = run(replace(case, **{name: infinite})).cpu()
            assert not result.isnan().any() and result[token].isinf().any(), f"inf in {name} became NaN"


def check_far_values(product: Product) -> None:
    """Raise AssertionError unless blocks behind the element 2**31 of values are read."""
    case = product.case(("x.", "xx"), dtype=torch.float16, block=(128, 128), out_features=256, in_features=256, free=0)
    slots = 2**31 // 128**2 + len(case.values)
    values = huge(slots * 128**2).view(slots, 128, 128)
    values[-len(case.values) :] = case.values
    free = case.row.new_full((slots - len(case.values),), -1)
    index = build_index(Topology(case.grid, *(torch.cat([free, places]).to(DEVICE) for places in (case.row, case.col))))
    here = case.on(DEVICE)
    with forced(product.config):
        check_y(case, gpu.linear.fwd(here.x, values, here.bias, index, case.geometry))
        check_dx(case, gpu.linear.dx(here.dy, values, index, case.geometry))


def far_apart(x: Tensor, stride: int | None = None) -> Tensor:
    """Return ``x (T, F)`` with its last row behind the element 2**31 of its storage, or with rows ``stride`` apart."""
    tokens, features = x.shape
    stride = stride or -(-(2**31) // (tokens - 1)) // 16 * 16 + 16
    rows = huge(tokens * stride, x.dtype).as_strided((tokens, features), (stride, 1))
    return rows.copy_(x)


def check_far_tokens(product: Product) -> None:
    """Raise AssertionError unless tokens behind the element 2**31 of x (of dy) are read."""
    for case, stride in (
        (product.case(dtype=torch.float16), None),
        (product.case(dtype=torch.float16, tokens=2), 2**31),  # the stride itself is no int32
    ):
        here, x, dy = case.on(DEVICE), far_apart(case.x, stride), far_apart(case.dy, stride)
        with forced(product.config):
            check_y(case, gpu.linear.fwd(x, here.values, here.bias, here.index, case.geometry))
            check_dx(case, gpu.linear.dx(dy, here.values, here.index, case.geometry))
