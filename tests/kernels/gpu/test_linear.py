"""The layer on Triton: what holds whichever kernel and configuration a call gets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from sparsekern.kernels import gpu
from sparsekern.kernels.gpu import linear

from sparsekern.topology import mask_index
from tests.device import DEVICE, in_dtypes, on_gpu_only
from tests.gpu_checks import (
    HOLES,
    PRODUCTS,
    Product,
    check_far_tokens,
    check_far_values,
    check_products,
    check_that_infinity_stays_infinite,
    check_that_nan_of_a_block_stays_in_its_row,
    check_that_nan_stays_where_it_is_read,
    corners,
    dvalues,
    dx,
    forced,
    fwd,
)
from tests.oracle import (
    DY_LAYOUTS,
    X_LAYOUTS,
    check_dvalues,
    check_dx,
    check_kernels,
    check_y,
    moved,
    random_case,
    with_slots_reordered,
)

TF32 = 2.0**-10


@pytest.fixture(params=PRODUCTS)
def product(request: pytest.FixtureRequest) -> Product:
    """One way through the kernels, with small tiles."""
    return PRODUCTS[request.param]


# As it is configured by default.


@pytest.mark.parametrize(("block", "dtype"), in_dtypes((16, 16), (64, 64), (32, 128)))
@pytest.mark.parametrize("tokens", [0, 1, 32, 33])
def test_the_layer_as_it_is_configured_by_default(tokens: int, block: tuple[int, int], dtype: torch.dtype) -> None:
    check_kernels(gpu, corners(block, tokens=tokens, dtype=dtype), DEVICE)


@pytest.mark.parametrize("seed", range(12))
def test_random_layers(seed: int) -> None:
    """Any block, edge, number of tokens, layout, with and without bias and free slots."""
    block = [(16, 16), (32, 32), (64, 64), (32, 64), (128, 16), (16, 32)][seed % 6]
    dtype = [torch.float32, torch.float16][seed % 2]

    check_kernels(gpu, random_case(seed, block=block, dtype=dtype), DEVICE)


# Layouts.


@pytest.mark.parametrize("dy_layout", DY_LAYOUTS)
def test_any_strides_of_dy_and_x(product: Product, dy_layout: str) -> None:
    """Beside a strided input lie NaN: who reads them shows it."""
    x_layout = X_LAYOUTS[DY_LAYOUTS.index(dy_layout) % len(X_LAYOUTS)]

    check_products(product.case(x_layout=x_layout, dy_layout=dy_layout), product.config)


def test_values_and_bias_of_any_strides(product: Product) -> None:
    case = product.edge_case()
    values = case.values.transpose(1, 2).contiguous().transpose(1, 2)
    assert case.bias is not None

    check_products(replace(case, values=values, bias=case.bias.repeat_interleave(2)[::2]), product.config)
    check_products(replace(case, bias=torch.tensor(3.0).expand(len(case.bias))), product.config)


def test_values_of_another_dtype_are_rounded_when_read(product: Product) -> None:
    """As under autocast."""
    check_products(product.edge_case(dtype=torch.float16, values_dtype=torch.float32), product.config)


def test_arguments_are_not_written_to(product: Product) -> None:
    here = product.edge_case().on(DEVICE)
    before = [t.clone() for t in (here.x, here.dy, here.values)]

    with forced(product.config):
        fwd(here), dx(here)

    assert all(torch.equal(t, b) for t, b in zip((here.x, here.dy, here.values), before, strict=True))


# Nothing there.


def test_no_tokens(product: Product) -> None:
    case = product.edge_case(tokens=0)

    check_products(case, product.config)
    assert not dvalues(case).any()


def test_empty_rows_write_the_bias_and_empty_columns_zeros(product: Product) -> None:
    """To the bit, at both ends and between."""
    case, (bo, bi) = product.case(HOLES), product.block
    assert case.bias is not None

    with forced(product.config):
        y, grad = fwd(case).cpu(), dx(case).cpu()

    check_y(case, y)
    check_dx(case, grad)
    for row in (0, 2, 5):
        assert torch.equal(y[:, row * bo : (row + 1) * bo], case.bias[row * bo : (row + 1) * bo].expand(len(y), -1))
    for col in (0, 5):
        assert not grad[:, col * bi : (col + 1) * bi].any()


@pytest.mark.parametrize("free", [0, 3])
def test_a_layer_without_a_stored_block(product: Product, free: int) -> None:
    case = product.case(("..", ".."), free=free)

    check_products(case, product.config)
    assert dvalues(case).shape == (free, *product.block)
    assert not dvalues(case).any()


def test_without_a_bias(product: Product) -> None:
    check_products(product.edge_case(bias=False), product.config)


# What must not leak.


def test_a_nan_in_a_block_reaches_only_its_row_and_in_dx_its_column(product: Product) -> None:
    check_that_nan_of_a_block_stays_in_its_row(product)


def test_an_infinity_in_x_stays_one_and_so_in_dy(product: Product) -> None:
    check_that_infinity_stays_infinite(product)


def test_a_nan_in_x_reaches_only_the_rows_that_read_it_and_so_in_dy(product: Product) -> None:
    check_that_nan_stays_where_it_is_read(product)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_free_slot_of_anything_reaches_nothing(product: Product, number: float) -> None:
    case = product.edge_case()
    values = case.values.clone()
    values[case.row < 0] = number
    broken = replace(case, values=values)

    with forced(product.config):
        assert torch.equal(fwd(broken), fwd(case))
        assert torch.equal(dx(broken), dx(case))


def test_what_the_phantom_part_holds_changes_nothing(product: Product) -> None:
    case, (bo, bi) = product.edge_case(), product.block
    values = case.values.clone()
    values[case.row == 2, bo - 11 :, :] = 1e30
    values[case.col == 3, :, bi - 9 :] = -1e30
    broken = replace(case, values=values)

    with forced(product.config):
        assert torch.equal(fwd(broken), fwd(case))
        assert torch.equal(dx(broken), dx(case))


# Order.


def test_two_calls_agree_to_the_bit_and_the_order_of_slots_does_not_matter(
    product: Product, generator: torch.Generator
) -> None:
    case = product.edge_case()
    shuffled = with_slots_reordered(case, torch.randperm(len(case.row), generator=generator))

    with forced(product.config):
        y, grad = fwd(case), dx(case)
        assert torch.equal(fwd(case), y) and torch.equal(fwd(shuffled), y)
        assert torch.equal(dx(case), grad) and torch.equal(dx(shuffled), grad)


def test_a_masked_index_leaves_blocks_out(product: Product) -> None:
    case = product.edge_case()
    keep = torch.arange(len(case.row)) % 3 > 0
    index = mask_index(case.index, keep, product.block)
    kept = replace(case, row=torch.where(keep, case.row, -1).int(), col=torch.where(keep, case.col, -1).int())
    index = type(index)(*(moved(t, DEVICE) for t in index))

    with forced(product.config):
        check_y(kept, fwd(case, index))
        check_dx(kept, dx(case, index))
    check_dvalues(kept, dvalues(case, torch.float32, index), torch.float32)


# Far away.


def test_blocks_behind_the_element_2_to_the_31_of_values(product: Product) -> None:
    check_far_values(product)


def test_tokens_behind_the_element_2_to_the_31_of_x_and_dy(product: Product) -> None:
    check_far_tokens(product)


# Precision.


@pytest.fixture
def tf32() -> Iterator[None]:
    """Let torch multiply float32 as tf32."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@on_gpu_only
@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("block", [(16, 16), (64, 64), (32, 128)])
@pytest.mark.parametrize("tokens", [5, 100])
def test_tf32_where_torch_is_set_so(tokens: int, block: tuple[int, int]) -> None:
    """Each factor keeps 10 bits; sums are of float32."""
    case = corners(block, tokens=tokens)

    check_y(case, fwd(case), TF32)
    check_dx(case, dx(case), TF32)
    check_dvalues(case, dvalues(case), torch.float32, TF32)


# Splits of the tokens.


@pytest.mark.parametrize(
    ("tokens", "tile_t", "programs", "wanted", "expected"),
    [
        (100, 16, 264, 264, 112),  # programs enough: all tokens, up to a whole tile
        (1000, 16, 10, 264, 144),  # 7 splits of at least 8 tiles; 143 tokens are 9 tiles
        (10**6, 64, 100, 264, 333_376),  # 3 splits fill the device
        (127, 16, 1, 264, 128),
        (1, 64, 1, 264, 64),
    ],
)
def test_tokens_of_a_split(tokens: int, tile_t: int, programs: int, wanted: int, expected: int) -> None:
    assert linear.tokens_per_split(tokens, tile_t, programs, wanted) == expected


@pytest.mark.parametrize("wanted", [1, 264])
@pytest.mark.parametrize("tile_t", [16, 64])
def test_splits_cover_the_tokens_and_none_is_empty(tile_t: int, wanted: int) -> None:
    for tokens in range(1, 5000, 37):
        per_split = linear.tokens_per_split(tokens, tile_t, 1, wanted)
        splits = -(-tokens // per_split)
        assert per_split % tile_t == 0
        assert (splits - 1) * per_split < tokens <= splits * per_split
