"""The projection of blocks of columns onto directions."""

from __future__ import annotations

import pytest
import torch
from sparsekern.kernels.gpu.linear import PROJECTED, project
from torch import Tensor

from tests.device import DEVICE, DTYPES, huge
from tests.oracle import F64, X_LAYOUTS, assert_within, lay_out, moved, signs


def check_projection(x: Tensor, on_device: Tensor, side: int, pairs: int = 3) -> None:
    """Raise AssertionError unless the projection of ``x (T, F)`` is right; ``on_device`` holds the same numbers."""
    tokens, features = x.shape
    blocks, directions = -(-features // side), signs(pairs, features, 0)
    whole = torch.zeros(tokens, blocks * side, dtype=F64)
    whole[:, :features] = x
    padded = torch.zeros(pairs, blocks * side, dtype=F64)
    padded[:, :features] = directions

    def projected(x: Tensor, directions: Tensor) -> Tensor:
        cut = (len(directions), blocks, side)
        return torch.einsum("tbi,qbi->qbt", x.view(tokens, blocks, side), directions.view(cut))

    assert_within(
        "projection",
        project(on_device, directions.to(DEVICE), side),
        projected(whole, padded),
        projected(whole.float(), padded.float()),
        projected(whole.abs(), padded.abs()),
        torch.tensor(float(side)),
        torch.float32,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", [16, 64, 128])
def test_any_side_and_dtype(side: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    x = torch.randn(9, 3 * side - 5, generator=generator).to(dtype)

    check_projection(x, x.to(DEVICE), side)


@pytest.mark.parametrize("tokens", [1, PROJECTED, PROJECTED + 1])
@pytest.mark.parametrize("pairs", [1, 4])
def test_any_number_of_tokens_and_directions(tokens: int, pairs: int, generator: torch.Generator) -> None:
    x = torch.randn(tokens, 48, generator=generator)

    check_projection(x, x.to(DEVICE), 16, pairs)


@pytest.mark.parametrize("layout", [*X_LAYOUTS, "one row expanded", "one number expanded"])
def test_any_strides(layout: str, generator: torch.Generator) -> None:
    """It is read once and needs no copy."""
    x = lay_out(torch.randn(20, 37, generator=generator), layout)

    check_projection(x, moved(x, DEVICE), 16)


@pytest.mark.parametrize("across", [False, True])
def test_elements_behind_the_2_to_the_31st(across: bool, generator: torch.Generator) -> None:
    """By the stride of tokens, or by that of features."""
    x = torch.randn(33, 33, generator=generator).half()
    strides = (1, 2**26) if across else (2**26, 1)
    far = huge(33 * 2**26).as_strided((33, 33), strides).copy_(x)

    check_projection(x, far, 16)


def test_a_nan_stays_in_its_block_and_token(generator: torch.Generator) -> None:
    x = torch.randn(5, 40, generator=generator)
    x[2, 20] = float("nan")

    out = project(x.to(DEVICE), signs(2, 40, 0).to(DEVICE), 16).cpu()

    hit = torch.zeros(2, 3, 5, dtype=torch.bool)
    hit[:, 1, 2] = True
    assert torch.equal(out.isnan(), hit)
