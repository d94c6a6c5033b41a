from __future__ import annotations

import inspect

import pytest
import torch
from sparsekern.kernels import eager
from sparsekern.kernels.contract import (
    PADDING,
    Backend,
    ConvShape,
    Index,
    accumulate_dtype,
    entry_columns,
    entry_rows,
)

from sparsekern.topology import Grid, Topology, build_index, with_capacity
from tests.kernels.calls import ints

KERNELS = [name for name in vars(Backend) if not name.startswith("_")]


def five_blocks(block: int) -> Topology:
    """Slots 0 to 4 in a 3 x 4 grid (letters are slots), and one free slot.

    . b . d
    . . . .
    c . a e
    """
    return with_capacity(
        Topology(Grid(3 * block, 4 * block, (block, block)), ints(2, 0, 2, 0, 2), ints(2, 1, 0, 3, 3)), 6
    )


def test_slots_are_counted_without_the_padding() -> None:
    lists = [torch.zeros(7 + PADDING, dtype=torch.int32)] * 6

    assert Index(*lists).slots == 7


@pytest.mark.parametrize("block", [1, 2])
def test_entry_columns_and_rows_are_the_same_whatever_the_index_holds(block: int) -> None:
    index = build_index(five_blocks(block))

    columns = entry_columns(index, (block, block), 0, 6)
    rows = entry_rows(index, (block, block), 0, 6)

    assert columns.dtype == rows.dtype == torch.int32
    assert columns[:5].tolist() == [1, 3, 0, 2, 3]  # b d | | c a e
    assert rows[:5].tolist() == [2, 0, 2, 0, 2]  # c | b | a | d e


@pytest.mark.parametrize("block", [1, 2])
def test_the_entry_of_a_free_slot_names_a_legal_block(block: int) -> None:
    index = build_index(five_blocks(block))

    assert 0 <= int(entry_columns(index, (block, block), 5, 6)) < 4
    assert 0 <= int(entry_rows(index, (block, block), 5, 6)) < 3


def test_entry_columns_leave_the_topology_alone() -> None:
    topology = five_blocks(1)
    index = build_index(topology)

    entry_columns(index, (1, 1), 0, 6)
    entry_rows(index, (1, 1), 0, 6)

    assert topology.row.tolist() == [2, 0, 2, 0, 2, -1]
    assert topology.col.tolist() == [2, 1, 0, 3, 3, -1]


@pytest.mark.parametrize(
    ("dtype", "sums"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_sums_are_formed_in_float32_or_wider(dtype: torch.dtype, sums: torch.dtype) -> None:
    assert accumulate_dtype(dtype) == sums


@pytest.mark.parametrize("name", KERNELS)
def test_the_eager_backend_has_every_function_of_the_contract(name: str) -> None:
    promised = list(inspect.signature(getattr(Backend, name)).parameters)[1:]  # without self

    assert list(inspect.signature(getattr(eager, name)).parameters) == promised


@pytest.mark.parametrize("block", [(1, 1), (3, 5), (128, 128)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_the_eager_backend_refuses_nothing(block: tuple[int, int], dtype: torch.dtype) -> None:
    assert eager.why_not("linear", torch.device("cpu"), dtype, block) is None


def test_the_sizes_of_a_convolution_by_hand() -> None:
    """Height 7 + 1 + 2 - 2 * 2 - 1 = 5 in steps of 2; width 6 + 0 + 0 - 1 - 1 = 4 in steps of 1."""
    shape = ConvShape(6, 10, (3, 2), (2, 1), (1, 2, 0, 0), (2, 1), 2)

    assert shape.output_size(7, 6) == (3, 5)
    assert (shape.taps, shape.group_in, shape.group_out) == (6, 3, 5)
    assert (shape.block_rows(4), shape.block_cols(2)) == (2, 2)


@pytest.mark.parametrize("kernel", [1, 2, 3, 7])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2])
def test_the_output_size_is_torchs(kernel: int, stride: int, dilation: int) -> None:
    shape = ConvShape(1, 1, (kernel, 1), (stride, 1), (3, 3, 0, 0), (dilation, 1))
    weight, x = torch.zeros(1, 1, kernel, 1), torch.zeros(1, 1, 11, 2)

    expected = torch.nn.functional.conv2d(x, weight, None, (stride, 1), (3, 0), (dilation, 1)).shape[2:]

    assert shape.output_size(11, 2) == tuple(expected)


@pytest.mark.parametrize(
    ("changed", "pointwise"),
    [
        ({}, True),
        ({"kernel": (1, 2)}, False),
        ({"stride": (1, 2)}, False),
        ({"padding": (0, 0, 1, 0)}, False),
        ({"groups": 2}, False),
        ({"dilation": (3, 3)}, True),
    ],
)
def test_pointwise(changed: dict[str, object], pointwise: bool) -> None:
    shape = ConvShape(**{"in_channels": 4, "out_channels": 2, "kernel": (1, 1), **changed})

    assert shape.is_pointwise is pointwise
