"""What a call of the Triton kernels holds beside its inputs and output: the lists in linear.py and conv2d.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sparsekern.kernels import gpu
from sparsekern.kernels.gpu import linear
from torch import Tensor

from tests.device import interpreted_only
from tests.gpu_checks import drawn
from tests.gpu_conv2d_checks import whole_case
from tests.memory import allocations

pytestmark = [interpreted_only, pytest.mark.usefixtures("no_tables")]

SMALL = 4096
"""Bytes that do not count: the interpreter's own tensors."""


def held(run: Callable[[], Tensor]) -> int:
    """Return the bytes that a call holds at most, less those of its result."""
    out = run()
    return allocations(run).peak - out.numel() * out.element_size()


@pytest.mark.parametrize(
    ("given", "fwd_copies", "dx_copies"),
    [
        ({"dtype": torch.float16}, 0, 0),
        ({"dtype": torch.float32}, 0, 4),  # dx: values transposed
        ({"dtype": torch.float16, "values_dtype": torch.float32}, 2, 2),  # rounded
        ({"dtype": torch.float16, "values_dtype": torch.float32, "tokens": 32}, 0, 0),  # few tokens: in registers
    ],
)
def test_what_a_product_holds(given: dict[str, Any], fwd_copies: int, dx_copies: int) -> None:
    """Bytes of a copy for each stored element; its blocks outweigh the tokens."""
    settings = {"block": (64, 64), "tokens": 64, "out_features": 256, "in_features": 256, "free": 0, **given}
    case = drawn(("xxxx",) * 4, **settings, x_layout="contiguous", dy_layout="contiguous")
    index = case.index

    fwd = held(lambda: gpu.linear.fwd(case.x, case.values, None, index, case.geometry))
    dx = held(lambda: gpu.linear.dx(case.dy, case.values, index, case.geometry))

    assert fwd <= fwd_copies * case.values.numel() + SMALL
    assert dx <= dx_copies * case.values.numel() + SMALL


@pytest.mark.parametrize(
    ("layout", "copied"), [("contiguous", False), ("one row expanded", False), ("transposed", True)]
)
def test_only_rows_that_are_not_aligned_are_copied(layout: str, copied: bool) -> None:
    case = drawn(("x",), block=(16, 16), tokens=1024, out_features=16, in_features=16, dy_layout=layout, free=0)

    extra = held(lambda: gpu.linear.dx(case.dy, case.values, case.index, case.geometry))

    assert (extra > case.dy.numel() * 4 // 2) is copied


@pytest.mark.parametrize(("rows", "splits"), [(("x",), 8), (("xxxx",) * 66, 1)])
def test_a_gradient_holds_a_workspace_only_where_blocks_are_few(
    rows: tuple[str, ...], splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2048 tokens are eight times eight tiles of 32; 264 blocks fill the device."""
    launched: list[int] = []
    monkeypatch.setattr(linear, "outer_kernel", Grids(launched))
    monkeypatch.setattr(linear, "sum_splits_kernel", Grids([]))
    case = drawn(
        rows, block=(128, 128), tokens=2048, out_features=128 * len(rows), in_features=128 * len(rows[0]), free=0,
        x_layout="contiguous", dy_layout="contiguous",
    )  # fmt: skip
    index, dtype = case.index, torch.float32

    extra = held(lambda: gpu.linear.dvalues(case.dy, case.x, index, (128, 128), case.geometry, dtype))

    assert set(launched) == {splits}
    workspace = splits * case.values.numel() * 4 if splits > 1 else 0
    assert workspace <= extra <= workspace + SMALL


@pytest.mark.parametrize(("dtype", "transposed"), [(torch.float16, 0), (torch.float32, 4)])
def test_a_convolution_holds_no_windows_and_no_dense_gradient(dtype: torch.dtype, transposed: int) -> None:
    """A matrix of all windows is 9 times x, and a dense gradient 8 times the stored one."""
    case = whole_case(dtype=dtype, bias=False, group_out=64, blocks=18, free=0, images=1, height=6, width=6)
    index, shape, block = case.index, case.shape, case.grid.block

    def copies(run: Callable[[], Tensor], allowed: int) -> None:
        assert held(run) <= allowed + SMALL < 9 * case.x.numel() * dtype.itemsize

    copies(lambda: gpu.conv2d.fwd(case.x, case.values, None, index, shape), 0)
    in_dx = 8 * index.slots + transposed * case.values.numel()  # the lists by phase, and values transposed
    copies(lambda: gpu.conv2d.dx(case.dy, case.values, index, shape, case.size), in_dx)
    copies(lambda: gpu.conv2d.dvalues(case.dy, case.x, index, block, shape, dtype), 0)
    copies(lambda: gpu.conv2d.all_block_norms(case.dy, case.x, block, shape), 0)


class Grids:
    """Stands for a kernel: notes the splits of its grids and launches nothing."""

    def __init__(self, launched: list[int]) -> None:
        self.launched = launched

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        self.launched.append(grid[1] if len(grid) > 1 else 1)
        return lambda *args, **kwargs: None
