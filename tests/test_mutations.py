"""Checks that never fail check nothing: here eager kernels are broken one at a time, and a check must turn red.

A row of a table names the function, what is replaced by what in its source, and the checks, which are those that the
other tests use. Each passes on the healthy code first.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from typing import Any

import pytest
import torch
from sparsekern.kernels import eager
from sparsekern.kernels.contract import Index
from sparsekern.kernels.eager import chunks, conv2d, linear, places, products
from sparsekern.kernels.eager.windows import Windows

from sparsekern.topology import index as index_module
from tests.kernels.calls import NAN, AnyCase, Calls
from tests.oracle import (
    Case,
    check_dvalues,
    check_dx,
    check_kernels,
    check_op,
    check_y,
    dense_weight,
    random_case,
    stored_blocks,
)
from tests.oracle_conv2d import ConvCase, conv_case

pytestmark = pytest.mark.usefixtures("poisoned_memory")

Check = Callable[[AnyCase], None]
calls = Calls(eager)


@contextmanager
def planted(function: Any, old: str, new: str) -> Iterator[None]:
    """Replace text that a function's source has once, wherever the function was imported."""
    function = inspect.unwrap(function)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{function.__qualname__} has {source.count(old)} times {old!r}"
    # Inside another function, whose argument is what a super() without arguments looks up.
    wrapped = (
        f"def outer(__class__):\n{textwrap.indent(source.replace(old, new), '    ')}    return {function.__name__}"
    )
    space: dict[str, Any] = {}
    exec("from __future__ import annotations\n" + wrapped, function.__globals__, space)
    healthy = function.__code__
    function.__code__ = inspect.unwrap(space["outer"](None)).__code__
    try:
        yield
    finally:
        function.__code__ = healthy


def layer() -> Case:
    """4 x 4 blocks of 4 x 4 with an edge on both sides; 10 stored, 2 free slots between them; 11 tokens."""
    return random_case(
        4,
        **{"block": (4, 4), "rows": 4, "cols": 4, "out_features": 14, "in_features": 15, "blocks": 10, "free": 2},
        **{"tokens": 11, "dtype": torch.float32, "bias": True, "x_layout": "contiguous", "dy_layout": "contiguous"},
    )


def convolution() -> ConvCase:
    """2 groups of 7 x 6 channels in blocks of 4 x 4, kernel 2 x 3, everything else different both ways."""
    given: dict[str, Any] = {"block": (4, 4), "kernel": (2, 3), "stride": (1, 2), "dilation": (2, 1), "groups": 2}
    given |= {"padding": (2, 0, 1, 0), "group_out": 7, "group_in": 6, "height": 5, "width": 8, "images": 2}
    return conv_case(1, **given, blocks=40, free=2, dtype=torch.float32, bias=True)


# The checks.


def y(case: AnyCase) -> None:
    check_y(case, calls.fwd(case))


def dx(case: AnyCase) -> None:
    check_dx(case, calls.dx(case))


def dvalues(case: AnyCase) -> None:
    check_dvalues(case, calls.dvalues(case, torch.float32), torch.float32)


def layout(case: AnyCase) -> None:
    check_kernels(eager, case)


def phantom_of_nan(case: AnyCase) -> None:
    """Without NaN the filling keeps phantom elements zero by itself."""
    grad = calls.dvalues(replace(case, x=torch.full_like(case.x, NAN)), torch.float32)
    for block, rows in zip(grad, case.grid.real_rows(case.row).tolist(), strict=True):
        assert not block[rows:].any(), "phantom elements are wrong"


def y_in_half(case: AnyCase) -> None:
    """64 blocks a row are enough to see a sum in bfloat16 above the rounding of the output."""
    given = {"block": (4, 4), "rows": 2, "cols": 64, "blocks": 128, "free": 0, "tokens": 33}
    y(random_case(0, **given, dtype=torch.bfloat16, dy_layout="contiguous"))


def masked_y(case: AnyCase) -> None:
    """The mask names free slots, too."""
    index = Index(*map(torch.zeros_like, case.index))
    places.masked_(index, case.index, torch.ones(12, dtype=torch.bool), by_slot=False)
    check_y(case, calls.fwd(case, index))


def in_scratch(scratch: int, check: Check) -> Check:
    """Return the check in a scratch that takes several panels, or several chunks of blocks."""

    @wraps(check)
    def checked(case: AnyCase) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chunks, "SCRATCH_BYTES", scratch)
            check(case)

    return checked


# The tables.

WRONG = r"(y|dx|dvalues)\[.*\] is .*, not .* elements are wrong"
"""What the oracle says: what is wrong, and where."""
EXPECTED = {
    "phantom elements are written": r"dvalues\[.*\] is 1000.0, not 0.0 \+- 0;",
    "phantom elements are not cleared": "phantom elements are wrong",
    "a free slot has a gradient": r"dvalues\[.*\] is .*, not 0.0 \+- 0;",
    "y is not channels last": "y is not channels last",
}
"""Messages that name the mistake itself."""

ORDERS = "kernels.orders_(index, topology.row, topology.col, by_slot=by_slot, ascending=ascending)"
ROWS_SWAPPED = "torch.tensor([1, 0, 2, 3, -1], dtype=torch.int32)[topology.row.long()]"
CLEAR = "clear_phantom(part, row, dy.shape[1], axis=1)"
SHORTER = "in ((a, b - (a == 0 and b < tokens)) for a, b in spans(tokens, panel))"
NO_FREE = ".clamp(max=rows - 1)"
TAP, CHANNEL = "(col // self.cols)", "col % self.cols"


def indexed(change: str) -> tuple[Any, str, str]:
    """Change the index after it was built right."""
    return index_module.rebuild_, ORDERS, f"{ORDERS}; {change}"


def gathered(places: str) -> tuple[Any, str, str]:
    return Windows.gather, "self._block_offsets(group, col)", f"self._block_offsets({places})"


Row = tuple[tuple[Any, str, str], tuple[Check, ...]]
LAYER: dict[str, Row] = {
    "a block is transposed": ((linear.multiply, "weight if transposed", "weight if not transposed"), (y, dx)),
    "a block of the gradient is transposed": (
        (linear.outer_blocks, "e1, part\n", "e1, part.transpose(1, 2).clone()\n"), (dvalues,)),
    "row_slot in the order of the entries": (
        indexed("index.row_slot[:12].copy_(torch.arange(12))"), (y, dvalues, check_op)),
    "col_slot in the order of the entries": (indexed("index.col_slot[:12].copy_(torch.arange(12))"), (dx,)),
    "row_col in the order of the slots": (indexed("index.row_col[:12].copy_(topology.col.clamp(min=0))"), (y, dvalues)),
    "col_row in the order of the slots": (indexed("index.col_row[:12].copy_(topology.row.clamp(min=0))"), (dx,)),
    "two rows of the index are swapped": (
        (index_module.rebuild_, "orders_(index, topology.row", f"orders_(index, {ROWS_SWAPPED}"),
        (y, dvalues, check_op)),
    "a pointer is off by one": (indexed("index.row_ptr[2].add_(1)"), (y,)),
    "phantom elements are written": ((linear.outer_blocks, CLEAR, "part[row == 3, 2:] = 1000.0"), (dvalues,)),
    "phantom elements are not cleared": ((linear.outer_blocks, CLEAR, "pass"), (phantom_of_nan,)),
    "a free slot is multiplied": ((linear.multiply, "(ptr, e0, e1)", f"(ptr, e0, e1){NO_FREE}"), (y, dx)),
    "a free slot has a gradient": (
        (products.stored_gradient, "e0, e1) == rows", f"e0, e1){NO_FREE} == rows"), (dvalues,)),
    "dx by the row lists": (
        (linear.dx, "index, geometry.in", "Index(*index[:3], *index[:3]), geometry.in"), (dx, check_op)),
    "the bias is dropped in the edge row": (
        (linear.multiply, "bo, acc, x.device)", "bo, acc, x.device); total[rows - 1] = 0"), (y, check_op)),
    "the last token of a panel is dropped": (  # never written: the poison is seen
        (linear.multiply, "in spans(tokens, panel)", SHORTER), (in_scratch(1000, y), in_scratch(1000, dx))),
    "the last token of a panel is dropped in the gradient": (
        (linear.outer_blocks, "in spans(tokens, panel)", SHORTER), (in_scratch(1000, dvalues),)),
    "a chunk of blocks is dropped": (
        (linear.multiply, "in spans(slots, chunk)", "in [*spans(slots, chunk)][chunk < slots :]"),
        (in_scratch(3000, y), in_scratch(3000, dx))),
    "a chunk of blocks is dropped in the gradient": (
        (linear.outer_blocks, "in spans(count, chunk)", "in [*spans(count, chunk)][chunk < count :]"),
        (in_scratch(3000, dvalues),)),
    "sums are formed in half precision": ((linear.multiply, "accumulate_dtype(x.dtype)", "x.dtype"), (y_in_half,)),
    "a mask lets free slots in": (
        (places._mask_order_, "used = ptr[-1]", "ptr = ptr.index_fill(0, torch.tensor([4]), 12); used = ptr[-1]"),
        (masked_y,)),
}  # fmt: skip
CONVOLUTION: dict[str, Row] = {
    "taps are read in reverse order": (gathered(f"group, (5 - {TAP}) * self.cols + {CHANNEL}"), (y, dvalues)),
    "taps are read column by column": (
        gathered(f"group, ({TAP} % 2 * 3 + {TAP} // 2) * self.cols + {CHANNEL}"), (y, dvalues)),
    "all groups read the first": (gathered("group * 0, col"), (y, dvalues)),
    "channels are read in reverse order": (gathered("group, col + 1 - 2 * (col % 2)"), (y, dvalues)),
    "padding above moves": ((Windows.__init__, "sh - top, -left", "sh - top + 1, -left"), (y, dx, dvalues)),
    "padding on the left moves": ((Windows.__init__, "sh - top, -left", "sh - top, 1 - left"), (y, dx, dvalues)),
    "dx by the taps in reverse order": ((Windows.tap, "divmod(number, kw)", "divmod(5 - number, kw)"), (dx,)),
    "a free slot is multiplied": ((conv2d.fwd, "row_ptr, e0, e1)", f"row_ptr, e0, e1){NO_FREE}"), (y,)),
    "a free slot is multiplied in dx": (
        (conv2d.dx, "col_ptr, e0, e1)", "col_ptr, e0, e1).clamp(max=cols - 1)"), (dx,)),
    "phantom elements are not cleared": (
        (conv2d.outer_blocks, "geometry.group_out, axis", "8, axis"), (phantom_of_nan,)),
    "y is not channels last": ((conv2d.fwd, "(0, 3, 1, 2)", "(0, 3, 1, 2).contiguous()"), (layout,)),
}  # fmt: skip
CASES = [
    pytest.param(make, name, row[0], check, id=f"{make.__name__}: {name}, {check.__name__}")
    for make, table in ((layer, LAYER), (convolution, CONVOLUTION))
    for name, row in table.items()
    for check in row[1]
]


@pytest.mark.parametrize(("make", "name", "mutation", "check"), CASES)
def test_a_broken_kernel_is_noticed(make, name, mutation, check):
    case = make()
    check(case)
    with planted(*mutation), pytest.raises(AssertionError, match=EXPECTED.get(name, WRONG)):
        check(case)


def test_the_oracle_by_hand() -> None:
    """Blocks of 2 x 2 in a matrix of 3 x 3, one in the corner that sticks out; the free slot is nowhere."""
    row = col = torch.tensor([1, -1, 0], dtype=torch.int32)
    values = torch.arange(12.0).view(3, 2, 2)

    weight = dense_weight(values, row, col, 3, 3)
    blocks = stored_blocks(weight, row, col, (2, 2))

    assert weight.tolist() == [[8, 9, 0], [10, 11, 0], [0, 0, 0]]
    assert blocks.tolist() == [[[0, 0], [0, 0]], [[0, 0], [0, 0]], [[8, 9], [10, 11]]]


def test_the_case_has_all_that_the_mutations_need() -> None:
    case = layer()
    check_kernels(eager, case)
    check_op(case)
    assert case.grid.has_edge
    assert bool((case.row < 0).any()) and int(case.row[-1]) >= 0
    assert case.index.row_slot[:12].tolist() != sorted(case.index.row_slot[:12].tolist())
    assert bool((case.row == 3).any()) and bool((case.col == 3).any())


@pytest.mark.parametrize("factor", [1 + 1e-5, 1 - 1e-5])
def test_an_error_in_the_sixth_digit_is_seen(factor: float) -> None:
    """The tolerance is not so wide that it hides anything."""
    case = layer()
    result = calls.fwd(case)
    check_y(case, result)
    with pytest.raises(AssertionError):
        check_y(case, result * factor)
