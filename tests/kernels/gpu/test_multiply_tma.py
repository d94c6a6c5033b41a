"""The kernel that loads through descriptors, and what those ask for."""

from __future__ import annotations

import pytest
import torch
from sparsekern.kernels.gpu import linear
from sparsekern.kernels.gpu.config import Multiply
from sparsekern.kernels.gpu.multiply import can_describe, descriptor

from tests.device import DEVICE, in_dtypes
from tests.gpu_checks import HOLES, check_products, corners, drawn

VALUES = torch.zeros(1, 64, 64).half()
TILE = (32, 64)


def config(tile_t: int = 16, tile_k: int = 32, group: int = 2) -> Multiply:
    return Multiply(tile_t, tile_k, group, warps=4, stages=3, tma=True)


@pytest.fixture
def only_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the pointer kernel fail, to which a call falls back when nothing can be described."""
    monkeypatch.setattr(linear, "multiply_kernel", None)


@pytest.mark.usefixtures("only_descriptors")
@pytest.mark.parametrize(
    ("sizes", "dtype"),
    in_dtypes(((64, 64), 64), ((64, 64), 16), ((128, 128), 64), ((64, 128), 32), ((128, 64), 64)),
)
def test_any_block_and_part_of_it(sizes: tuple[tuple[int, int], int], dtype: torch.dtype) -> None:
    check_products(corners(sizes[0], dtype=dtype), config(tile_k=sizes[1]))


@pytest.mark.usefixtures("only_descriptors")
@pytest.mark.parametrize(("tile_t", "tokens"), [(16, 33), (16, 48), (32, 65), (64, 65), (64, 128)])
def test_any_number_of_tokens(tile_t: int, tokens: int) -> None:
    check_products(corners((64, 64), tokens=tokens, dtype=torch.float16), config(tile_t))


@pytest.mark.usefixtures("only_descriptors")
@pytest.mark.parametrize("group", [1, 3, 8])
def test_groups_of_token_tiles_and_empty_rows(group: int) -> None:
    check_products(drawn(HOLES, block=(64, 64), tokens=65, dtype=torch.float16), config(group=group))


@pytest.mark.usefixtures("only_descriptors")
@pytest.mark.parametrize(("out_features", "in_features"), [(192, 250), (187, 256), (184, 248)])
def test_edges_on_either_side_aligned_or_not(out_features: int, in_features: int) -> None:
    """What lies beyond the last feature reads as zero by the descriptor itself: there is no mask."""
    check_products(corners((64, 64), out_features=out_features, in_features=in_features), config())


@pytest.mark.parametrize(("slots", "described"), [(2**31 // 64 - 1, True), (2**31 // 64, False)])
def test_coordinates_are_of_32_bits(slots: int, described: bool) -> None:
    values = torch.empty(slots, 64, 64, dtype=torch.float16, device="meta")
    x = torch.empty(32, 64, device="meta", dtype=torch.float16)

    assert can_describe(x, values, TILE) is described
    assert can_describe(torch.empty(2**31, 64, device="meta"), values, TILE) is False


def test_a_descriptor_has_the_strides_of_its_matrix() -> None:
    described = descriptor(torch.zeros(8, 64, device=DEVICE)[:, :32], (4, 16))

    assert (described.shape, described.strides, described.block_shape) == ([8, 32], [64, 1], [4, 16])


@pytest.mark.parametrize("free", [0, 3])
def test_a_layer_without_a_stored_block_takes_the_pointer_kernel(free: int) -> None:
    check_products(drawn(("..", ".."), block=(64, 64), tokens=33, free=free), config())


def test_fewer_tokens_than_a_tile_take_the_pointer_kernel() -> None:
    check_products(corners((64, 64), tokens=33), config(64))


def test_an_expanded_row_takes_the_pointer_kernel() -> None:
    check_products(corners((64, 64), out_features=192, in_features=256, dy_layout="one row expanded"), config())


@pytest.mark.parametrize(
    ("x", "described"),
    [
        (torch.ones(32, 64), True),
        (torch.ones(31, 64), False),  # a box larger than what it is taken from
        (torch.ones(32, 56), False),
        (torch.ones(32, 128).half()[:, :64], False),  # holes between the rows: a defect of drivers for Blackwell
        (torch.ones(1, 64).half().expand(32, 64), False),  # rows on top of each other
        (torch.ones(32, 66), False),  # rows of 132 bytes
        (torch.ones(32 * 64 + 4).half()[1:-3].view(32, 64), False),  # a start of 2 bytes
    ],
)
def test_what_can_be_described(x: torch.Tensor, described: bool) -> None:
    assert can_describe(x.half(), VALUES, TILE) is described


def test_blocks_at_an_odd_address_are_not_described() -> None:
    odd = torch.zeros(64 * 64 + 1).half()[1:].view(1, 64, 64)

    assert not can_describe(torch.ones(32, 64).half(), odd, TILE)
    assert not can_describe(torch.ones(32, 64).half(), VALUES[:0], TILE), "nothing is stored"
