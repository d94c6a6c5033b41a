"""The projection of what each tap sees, through the sketches that it is half of."""

from __future__ import annotations

import pytest
import torch

from tests.device import DTYPES
from tests.gpu_conv2d_checks import SHAPES, check_sketches, edge_case


@pytest.mark.parametrize("name", SHAPES)
def test_any_convolution(name: str) -> None:
    check_sketches(edge_case(**SHAPES[name]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [(16, 32), (128, 128)])
def test_any_dtype_and_side(block: tuple[int, int], dtype: torch.dtype) -> None:
    check_sketches(edge_case(block=block, dtype=dtype, kernel=(1, 2), images=1), pairs=3)
