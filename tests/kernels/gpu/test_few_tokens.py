"""The kernel for up to 32 tokens, which reads values of any dtype."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sparsekern.kernels.gpu import linear
from sparsekern.kernels.gpu.config import FewTokens
from sparsekern.kernels.gpu.multiply import few_tokens_kernel

from tests.device import DEVICE, huge, in_dtypes
from tests.gpu_checks import HOLES, PRODUCTS, check_products, corners, drawn, fwd
from tests.oracle import check_y


@pytest.fixture(autouse=True)
def _only_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "multiply_kernel", None)


def config(tile_n: int = 16, tile_k: int = 32) -> FewTokens:
    return FewTokens(tile_n, tile_k, warps=2, stages=4)


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 31, 32])
@pytest.mark.parametrize("tile_k", [16, 64])
def test_any_number_of_tokens(tile_k: int, tokens: int) -> None:
    check_products(corners((16, 32), tokens=tokens), config(tile_k=tile_k))


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    in_dtypes(
        ((16, 16), 16, 16),
        ((16, 16), 16, 64),
        ((32, 32), 32, 16),
        ((32, 32), 16, 128),
        ((64, 64), 16, 64),
        ((128, 128), 32, 128),
        ((16, 64), 16, 32),
        ((128, 32), 32, 64),
    ),
)
def test_any_block_and_tile(sizes: tuple[tuple[int, int], int, int], dtype: torch.dtype) -> None:
    block, tile_n, tile_k = sizes
    check_products(corners(block, tokens=3, dtype=dtype), config(tile_n, tile_k))


@pytest.mark.parametrize("tile_k", [16, 64])
@pytest.mark.parametrize(
    ("dtype", "values_dtype"),
    [
        (torch.float16, torch.float32),
        (torch.float32, torch.float16),
        (torch.float32, torch.float64),
    ],
)
def test_values_and_bias_of_another_dtype(dtype: torch.dtype, values_dtype: torch.dtype, tile_k: int) -> None:
    """They are rounded in registers: no copy of the whole weight is made for one token."""
    case = corners((32, 16), tokens=5, dtype=dtype, values_dtype=values_dtype)

    check_products(case, config(tile_k=tile_k))


@pytest.mark.parametrize("blocks", [1, 3, 4, 5, 8])
def test_rows_that_end_inside_a_turn(blocks: int) -> None:
    """4 blocks a turn."""
    row = "x" * blocks + "." * (8 - blocks)

    check_products(drawn((row, "x.xxx.xx", row[::-1]), block=(16, 16), tokens=9), config(tile_k=64))


def test_empty_rows_at_both_ends() -> None:
    check_products(drawn(HOLES, block=(32, 16), tokens=4), config())


@pytest.mark.parametrize(("out_features", "in_features"), [(48, 61), (43, 64), (40, 56)])
def test_edges_on_either_side_aligned_or_not(out_features: int, in_features: int) -> None:
    case = corners((16, 16), out_features=out_features, in_features=in_features, tokens=2, dtype=torch.float16)

    check_products(case, config())


def test_one_token_of_any_stride() -> None:
    """The stride of a single row means nothing; torch gives any number there."""
    case = corners((16, 16), tokens=1, in_features=64)
    odd = replace(case, x=case.x.as_strided((1, 64), (7, 1)))

    check_y(odd, fwd(odd))


@pytest.mark.parametrize("name", ["few gather", "few parts"])
def test_a_token_of_y_behind_the_element_2_to_the_31(name: str) -> None:
    """As if y had 2**27 columns: the kernel is told so, and one block row of it is computed."""
    product, columns, tokens = PRODUCTS[name], 2**27, 17
    case = product.case(("xx",), dtype=torch.float16, free=0, tokens=tokens)
    here, (bo, bi), tile_n = case.on(DEVICE), product.block, product.config.tile_n
    index, y = here.index, huge(tokens * columns).view(tokens, columns)

    few_tokens_kernel[(bo // tile_n,)](
        here.x, here.values, here.bias, index.row_ptr, index.row_col, index.row_slot, y,
        tokens, case.x.shape[1] // 8, columns, case.x.stride(0) // 8,
        ALIGN=8, IN=bi, OUT=bo, STRIDE_K=1, STRIDE_N=bi, TOKENS=32, TILE_K=product.config.tile_k, TILE_N=tile_n,
        HAS_BIAS=True, EDGE_IN=False, PRECISION="ieee",
    )  # fmt: skip

    check_y(case, y[:, :bo])
