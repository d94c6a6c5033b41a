"""The pointer kernel: gathers of small blocks, parts of large ones, tiles and tails of each kind."""

from __future__ import annotations

import pytest
import torch
import triton
from sparsekern.kernels.gpu.config import Multiply
from sparsekern.kernels.gpu.multiply import multiply_kernel
from torch import Tensor

from tests.device import DEVICE, huge, in_dtypes
from tests.gpu_checks import CUT_PRODUCTS, HOLES, PRODUCTS, check_products, corners, drawn
from tests.oracle import Case, check_y


def config(tile_t: int = 16, tile_k: int = 32, group: int = 2) -> Multiply:
    return Multiply(tile_t, tile_k, group, warps=4, stages=3)


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    in_dtypes(
        ((16, 16), 16),  # one block a turn
        ((16, 16), 32),  # two blocks a turn
        ((16, 16), 128),  # more blocks a turn than a row has
        ((32, 32), 16),  # half a block a turn
        ((32, 32), 64),
        ((64, 64), 32),
        ((128, 128), 128),
        ((16, 64), 32),  # parts for y, a gather for dx
        ((64, 16), 32),  # the other way round
        ((32, 128), 64),
    ),
)
def test_any_block_with_tiles_of_k_larger_and_smaller(sizes: tuple[tuple[int, int], int], dtype: torch.dtype) -> None:
    check_products(corners(sizes[0], dtype=dtype), config(tile_k=sizes[1]))


@pytest.mark.parametrize("tokens", [33, 48, 65])
@pytest.mark.parametrize("tile_t", [16, 32, 64])
def test_any_number_of_tokens_and_of_token_tiles(tile_t: int, tokens: int) -> None:
    check_products(corners((16, 16), tokens=tokens), config(tile_t))


@pytest.mark.parametrize("name", CUT_PRODUCTS)
def test_programs_that_share_a_block_row(name: str) -> None:
    product = CUT_PRODUCTS[name]
    check_products(product.edge_case(dtype=torch.float16), product.config)
    check_products(product.case(HOLES, free=0), product.config)


@pytest.mark.parametrize("group", [1, 2, 3, 8])
@pytest.mark.parametrize("pattern", [("xx", "x."), ("x",), HOLES])
def test_groups_of_token_tiles_that_do_not_come_out_even(pattern: tuple[str, ...], group: int) -> None:
    """5 tiles of tokens: the last group has one tile, two tiles, or it is the only one."""
    check_products(drawn(pattern, block=(16, 16), tokens=65), config(group=group))


@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 5, 8])
def test_rows_that_end_inside_a_turn(blocks: int) -> None:
    """4 blocks a turn. Behind the row are blocks of the next one, then free slots and the padding."""
    row = "x" * blocks + "." * (8 - blocks)

    check_products(drawn((row, "x.xxx.xx", row[::-1]), block=(16, 16), tokens=33), config(tile_k=64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("out_features", "in_features"), [(48, 61), (43, 64), (40, 56), (33, 49)])
@pytest.mark.parametrize("tile_k", [16, 64])
def test_edges_on_either_side_aligned_or_not(
    tile_k: int, out_features: int, in_features: int, dtype: torch.dtype
) -> None:
    check_products(
        corners((16, 16), out_features=out_features, in_features=in_features, dtype=dtype), config(tile_k=tile_k)
    )


@pytest.mark.parametrize("name", ["gather", "parts"])
def test_a_tile_of_y_behind_the_element_2_to_the_31(name: str) -> None:
    """As if y had 2**26 columns: the kernel is told so, and one block row of it is computed."""
    product, columns = PRODUCTS[name], 2**26
    case = product.case(("xx",), dtype=torch.float16, free=0)
    here, tokens, out = case.on(DEVICE), product.tokens, case.grid.out_features
    y = huge(tokens * columns).view(tokens, columns)

    launch(here, y, columns, product.config)

    check_y(case, y[:, :out])


def launch(case: Case, y: Tensor, columns: int, config: Multiply) -> None:
    """Write one block row of a layer of one block row."""
    (bo, bi), index, tokens = case.grid.block, case.index, case.x.shape[0]
    multiply_kernel[(triton.cdiv(tokens, config.tile_t),)](
        case.x, case.values, case.bias, index.row_ptr, index.row_col, index.row_slot, y,
        tokens, 1, case.x.shape[1] // 8, columns, case.x.stride(0) // 8,
        ALIGN=8, IN=bi, OUT=bo, STRIDE_K=1, STRIDE_N=bi,
        TILE_T=config.tile_t, TILE_K=config.tile_k, GROUP=config.group, CUT=1,
        HAS_BIAS=True, EDGE_IN=False, EDGE_OUT=False, PRECISION="ieee",
    )  # fmt: skip
