"""The kernel that loads through descriptors, and what those ask for."""

from __future__ import annotations

import pytest
import torch
from sparsekern.kernels.gpu import linear
from sparsekern.kernels.gpu.config import Multiply
from sparsekern.kernels.gpu.multiply_tma import can_describe, descriptor

from tests.device import DEVICE, DTYPES
from tests.gpu_checks import HOLES, check_products, corners, drawn, far_apart


def config(tile_t: int = 16, tile_k: int = 32, group: int = 2) -> Multiply:
    return Multiply(tile_t, tile_k, group, warps=4, stages=3, tma=True)


@pytest.fixture
def only_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the pointer kernel fail, to which a call falls back when nothing can be described."""
    monkeypatch.setattr(linear, "multiply_kernel", None)


@pytest.mark.usefixtures("only_descriptors")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("block", "tile_k"), [((64, 64), 64), ((64, 64), 16), ((128, 128), 64), ((64, 128), 32), ((128, 64), 64)]
)
def test_any_block_and_part_of_it(block: tuple[int, int], tile_k: int, dtype: torch.dtype) -> None:
    check_products(corners(block, dtype=dtype), config(tile_k=tile_k))


@pytest.mark.usefixtures("only_descriptors")
@pytest.mark.parametrize("tokens", [33, 48, 65])
@pytest.mark.parametrize("tile_t", [16, 64])
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


def values_of(slots: int) -> torch.Tensor:
    return torch.zeros(1, dtype=torch.float16).expand(slots, 64, 64).as_strided((slots, 64, 64), (64 * 64, 64, 1), 0)


def test_what_can_be_described() -> None:
    x, values = torch.zeros(4, 64), torch.zeros(3, 64, 64)

    assert can_describe(x, values)
    assert not can_describe(torch.zeros(4, 62), values), "rows of 248 bytes"
    assert not can_describe(x[:1].expand(4, 64), values), "rows on top of each other"
    assert not can_describe(torch.zeros(4 * 64 + 4)[1:-3].view(4, 64), values), "a start of 4 bytes"
    assert not can_describe(x, values[:0]), "nothing"
    assert not can_describe(x, values.transpose(1, 2)), "blocks that are not contiguous"
    assert not can_describe(x, torch.zeros(3, 64, 66)), "lines of 264 bytes"
    assert not can_describe(x, torch.zeros(3 * 64 * 64 + 4)[1:-3].view(3, 64, 64)), "values at 4 bytes"


@pytest.mark.parametrize(("slots", "described"), [(2**31 // 64 - 1, True), (2**31 // 64, False)])
def test_coordinates_are_of_32_bits(slots: int, described: bool) -> None:
    values = torch.empty(slots, 64, 64, dtype=torch.float16, device="meta")
    x = torch.empty(4, 64, device="meta", dtype=torch.float16)

    assert can_describe(x, values) is described
    assert can_describe(torch.empty(2**31, 64, device="meta"), values) is False


def test_a_descriptor_has_the_strides_of_its_matrix() -> None:
    described = descriptor(torch.zeros(8, 64, device=DEVICE)[:, :32], (4, 16))

    assert (described.shape, described.strides, described.block_shape) == ([8, 32], [64, 1], [4, 16])


@pytest.mark.parametrize("free", [0, 3])
def test_a_layer_without_a_stored_block_takes_the_pointer_kernel(free: int) -> None:
    check_products(drawn(("..", ".."), block=(64, 64), tokens=33, free=free), config())


def test_an_expanded_row_takes_the_pointer_kernel() -> None:
    check_products(corners((64, 64), out_features=192, in_features=256, dy_layout="one row expanded"), config())


def test_rows_far_apart_are_described() -> None:
    assert can_describe(far_apart(torch.ones(3, 64).half()), torch.zeros(1, 64, 64).half())
