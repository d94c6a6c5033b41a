"""The guard itself: a kernel that goes one element too far is caught, one that does not is left alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.device import interpreted_only
from tests.guard import extent, guarded

pytestmark = interpreted_only


@triton.jit
def copy_kernel(from_ptr, to_ptr, start, count, written, SIZE: tl.constexpr):
    i = start + tl.arange(0, SIZE)
    tl.store(to_ptr + i, tl.load(from_ptr + i, mask=i < count, other=0.0), mask=i < written)


@triton.jit
def read_one(ptr, place):
    return tl.load(ptr + place)


@triton.jit
def one_kernel(from_ptr, to_ptr, place):
    tl.store(to_ptr, read_one(from_ptr, place))


@triton.jit
def described_kernel(desc, to_ptr, first, SIZE: tl.constexpr):
    tl.store(to_ptr + tl.arange(0, SIZE), tl.sum(desc.load([first, 0]), 1))


@pytest.fixture(autouse=True)
def _guarded() -> Iterator[None]:
    with guarded():
        yield


def middle(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a view into the middle of a storage: beside it is memory that may be read, but was not given."""
    return torch.arange(size + 32).to(dtype)[16 : 16 + size]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32])
def test_the_last_element_may_be_read_and_written(dtype: torch.dtype) -> None:
    source, target = middle(5, dtype), torch.zeros(5, dtype=dtype)

    copy_kernel[(1,)](source, target, 0, 5, 5, SIZE=8)

    assert target.tolist() == [16, 17, 18, 19, 20]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int32])
def test_one_element_read_too_far(dtype: torch.dtype) -> None:
    with pytest.raises(AssertionError, match=r"copy_kernel reads element 5 of from_ptr, which ends at 5; 1 of 6 "):
        copy_kernel[(1,)](middle(5, dtype), middle(6, dtype), 0, 6, 5, SIZE=8)


def test_one_element_read_too_early() -> None:
    with pytest.raises(AssertionError, match="reads element -1 of from_ptr"):
        copy_kernel[(1,)](middle(5), middle(8), -1, 5, 5, SIZE=8)


def test_one_element_written_too_far() -> None:
    with pytest.raises(AssertionError, match=r"copy_kernel writes element 4 of to_ptr, which ends at 4; 1 of 5 "):
        copy_kernel[(1,)](middle(5), middle(4), 0, 5, 5, SIZE=8)


def test_a_number_read_too_far_in_a_function_of_the_kernel() -> None:
    with pytest.raises(AssertionError, match="one_kernel reads element 5 of from_ptr"):
        one_kernel[(1,)](middle(5), middle(1), 5)


def test_what_is_masked_may_be_anywhere() -> None:
    copy_kernel[(1,)](middle(5), middle(5), 2**30, 5, 5, SIZE=8)


def test_memory_of_another_dtype_is_another_tensor() -> None:
    """An int32 that was read from floats would be an index."""
    with pytest.raises(AssertionError, match="reads float32 and was given none"):
        guard_reads_floats_of(middle(5, torch.int32))


def guard_reads_floats_of(integers: Tensor) -> None:
    from triton.runtime import interpreter

    interpreter._interpreter.extents = [extent("integers", integers)]
    one = torch.tensor([integers.data_ptr()]).numpy().astype("uint64")
    interpreter._interpreter.load(one, one > 0, one, "float32")


def test_a_descriptor_gives_its_matrix() -> None:
    matrix, sums = torch.ones(6, 16), torch.zeros(4)

    described_kernel[(1,)](TensorDescriptor(matrix, [6, 16], [16, 1], [4, 16]), sums, 4, SIZE=4)
    assert sums.tolist() == [16, 16, 0, 0]

    with pytest.raises(AssertionError, match="described_kernel reads element 96 of desc, which ends at 96"):
        described_kernel[(1,)](TensorDescriptor(matrix, [7, 16], [16, 1], [4, 16]), sums, 4, SIZE=4)


def test_the_extent_of_a_view_is_that_of_its_elements() -> None:
    """Columns 1 to 3 of 4 x 5: from element 1 to element 3 * 5 + 3."""
    wide = torch.zeros(4, 5)

    view = extent("x", wide[:, 1:4])

    assert (view.start - wide.data_ptr(), view.stop - wide.data_ptr()) == (4, 4 * 19)


def test_after_the_guard_the_interpreter_is_as_before() -> None:
    from triton.runtime import interpreter

    before = interpreter._interpreter
    with guarded():
        assert interpreter._interpreter is not before
    assert interpreter._interpreter is before
