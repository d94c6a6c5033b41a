"""The norms of all blocks of a convolution at once."""

from __future__ import annotations

import pytest
import torch
from sparsekern.kernels import gpu

from tests.device import DEVICE, DTYPES
from tests.gpu_checks import forced
from tests.gpu_conv2d_checks import SHAPES, SUPERTILE, check_all_block_norms, edge_case


@pytest.mark.parametrize("name", ["padded", "dilated and strided", "grouped", "same, on four sides"])
def test_any_convolution(name: str) -> None:
    check_all_block_norms(edge_case(**SHAPES[name]), SUPERTILE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_dtype_as_it_is_configured_by_default(dtype: torch.dtype) -> None:
    check_all_block_norms(edge_case(dtype=dtype, kernel=(2, 2), block=(32, 16)))


@pytest.mark.parametrize("which", ["dy", "x"])
def test_a_nan_reaches_only_the_blocks_that_it_belongs_to(which: str) -> None:
    """In dy a block row, in x a block of channels in the taps that see the pixel: the last one, which sticks out."""
    case = edge_case(kernel=(2, 1), padding=(0, 0, 0, 0), height=3, width=2, images=1)
    tensors = {"dy": case.dy.clone(), "x": case.x.clone()}
    tensors[which][0, -1, 0, 0] = float("nan")  # the pixel above left: seen by the first tap only
    expected = torch.zeros(2, 2, 3, dtype=torch.bool)  # row, tap, block of channels
    if which == "dy":
        expected[1] = True
    else:
        expected[:, 0, 2] = True
    with forced(SUPERTILE):
        norms = gpu.conv2d.all_block_norms(*(tensors[n].to(DEVICE) for n in ("dy", "x")), (16, 16), case.shape)
    assert torch.equal(norms.isnan().cpu().view(2, 2, 3), expected)
