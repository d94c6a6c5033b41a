"""The functions of a backend, called by the case: of a linear layer or of a convolution."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from sparsekern.kernels.contract import Index
from torch import Tensor

from tests.oracle import Case, all_cells, check_kernels, check_norms, check_sketch, random_case, signs
from tests.oracle_conv2d import ConvCase, conv_case

AnyCase = Case | ConvCase
NAN = float("nan")


def ints(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def is_real(case: AnyCase) -> Tensor:
    """Return ``(Z, bo, bi)`` bool: which elements are stored and inside the matrix, neither free nor phantom."""
    return case.blocks_at(torch.ones_like(case.weight), case.row, case.col) > 0


class Calls:
    """The functions of a backend, on a device; each gives the case's own index unless another one is passed."""

    def __init__(self, backend: ModuleType, device: str = "cpu") -> None:
        self.backend, self.device = backend, device

    def kernels(self, case: AnyCase) -> Any:
        return self.backend.kernels(case.geometry)

    def fwd(self, case: AnyCase, index: Index | None = None) -> Tensor:
        here = case.on(self.device)
        return self.kernels(case).fwd(here.x, here.values, here.bias, index or here.index, case.geometry)

    def dx(self, case: AnyCase, index: Index | None = None) -> Tensor:
        here = case.on(self.device)
        return self.kernels(case).dx(here.dy, here.values, index or here.index, case.geometry, case.size)

    def dvalues(self, case: AnyCase, dtype: torch.dtype | None = None, index: Index | None = None) -> Tensor:
        here = case.on(self.device)
        given = here.dy, here.x, index or here.index, case.grid.block, case.geometry, dtype or case.values.dtype
        return self.kernels(case).dvalues(*given)

    def backward(self, case: AnyCase, index: Index | None = None) -> tuple[Tensor, Tensor]:
        here = case.on(self.device)
        return self.kernels(case).backward(here.dy, here.x, here.values, index or here.index, case.geometry)

    def results(self, case: AnyCase) -> tuple[Tensor, Tensor, Tensor]:
        return self.fwd(case), self.dx(case), self.dvalues(case, torch.float32)

    def all_norms(self, case: AnyCase) -> Tensor:
        here = case.on(self.device)
        return self.kernels(case).all_block_norms(here.dy, here.x, case.grid.block, case.geometry)

    def chosen_norms(self, case: AnyCase, row: Tensor, col: Tensor) -> Tensor:
        here, places = case.on(self.device), (row.to(self.device), col.to(self.device))
        return self.kernels(case).block_norms(here.dy, here.x, *places, case.grid.block, case.geometry)

    def sketch(self, case: AnyCase, u: Tensor, v: Tensor) -> Tensor:
        here, pairs = case.on(self.device), (u.to(self.device), v.to(self.device))
        return self.kernels(case).sketch(here.dy, here.x, *pairs, case.grid.block, case.geometry)

    def check(self, case: AnyCase) -> None:
        """Compare all products with the oracle."""
        check_kernels(self.backend, case, self.device)

    def check_scores(self, case: AnyCase) -> None:
        """Compare the norms of all blocks, those of every block chosen, and a sketch with the oracle."""
        u, v = directions(case, 3)
        check_norms(case, self.all_norms(case).cpu())
        check_norms(case, self.chosen_norms(case, *all_cells(case)).cpu())
        check_sketch(case, self.sketch(case, u, v).cpu(), u, v)


def directions(case: AnyCase, pairs: int) -> tuple[Tensor, Tensor]:
    """Return ``u`` and ``v`` of a sketch: signs."""
    return signs(pairs, case.grid.out_features, 0), signs(pairs, case.grid.in_features, 1)


# Cases, of any block.


def small_layer(block: tuple[int, int] = (4, 4), **given: Any) -> Case:
    """5 x 4 blocks that stick out on both sides (18 x 15 in blocks of 4 x 4), 9 stored, and 2 free slots."""
    sizes = {"out_features": 5 * block[0] - block[0] // 2, "in_features": 4 * block[1] - block[1] // 4}
    settings = {"rows": 5, "cols": 4, **sizes, "blocks": 9, "free": 2, "tokens": 7, "dtype": torch.float32}
    settings |= {"bias": True, "x_layout": "contiguous", "dy_layout": "contiguous"}
    return random_case(0, **{**settings, "block": block, **given})


def small_conv(block: tuple[int, int] = (4, 4), **given: Any) -> ConvCase:
    """3x3, 2 groups (6 x 7 channels in blocks of 4 x 4): an edge in every tap and group; 11 stored, 2 free slots."""
    settings = {"kernel": (3, 3), "stride": (1, 1), "dilation": (1, 1), "padding": (1, 1, 1, 1), "groups": 2}
    settings |= {"group_out": block[0] + (block[0] // 2 or 5), "group_in": block[1] + (3 * block[1] // 4 or 6)}
    settings |= {"height": 5, "width": 6, "images": 3, "blocks": 11, "free": 2, "dtype": torch.float32, "bias": True}
    return conv_case(0, **{**settings, "block": block, **given})


def full(make: Callable[..., AnyCase], *block: tuple[int, int], **given: Any) -> AnyCase:
    """Return a case with all blocks stored."""
    return make(*block, blocks=make(*block).grid.cells, **given)
