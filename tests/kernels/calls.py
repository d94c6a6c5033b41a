"""The functions of a backend, called by the case: of a linear layer or of a convolution."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from sparsekern.kernels.contract import Index
from torch import Tensor

from tests.oracle import Case, all_cells, check_kernels, check_norms, check_sketch, signs
from tests.oracle_conv2d import ConvCase

AnyCase = Case | ConvCase
NAN = float("nan")


def ints(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def is_real(case: AnyCase) -> Tensor:
    """Return ``(Z, bo, bi)`` bool: which elements are stored and inside the matrix, neither free nor phantom."""
    return case.blocks_at(torch.ones_like(case.weight), case.row, case.col) > 0


class Calls:
    """The functions of a backend; each takes a case and gives it the case's own index unless another one is passed."""

    def __init__(self, backend: ModuleType) -> None:
        self.backend = backend

    def kernels(self, case: AnyCase) -> Any:
        return self.backend.kernels(case.geometry)

    def fwd(self, case: AnyCase, index: Index | None = None) -> Tensor:
        return self.kernels(case).fwd(case.x, case.values, case.bias, index or case.index, case.geometry)

    def dx(self, case: AnyCase, index: Index | None = None) -> Tensor:
        return self.kernels(case).dx(case.dy, case.values, index or case.index, case.geometry, case.size)

    def dvalues(self, case: AnyCase, dtype: torch.dtype | None = None, index: Index | None = None) -> Tensor:
        given = case.dy, case.x, index or case.index, case.grid.block, case.geometry, dtype or case.values.dtype
        return self.kernels(case).dvalues(*given)

    def backward(self, case: AnyCase) -> tuple[Tensor, Tensor]:
        return self.kernels(case).backward(case.dy, case.x, case.values, case.index, case.geometry)

    def results(self, case: AnyCase) -> tuple[Tensor, Tensor, Tensor]:
        return self.fwd(case), self.dx(case), self.dvalues(case, torch.float32)

    def all_norms(self, case: AnyCase) -> Tensor:
        return self.kernels(case).all_block_norms(case.dy, case.x, case.grid.block, case.geometry)

    def chosen_norms(self, case: AnyCase, row: Tensor, col: Tensor) -> Tensor:
        return self.kernels(case).block_norms(case.dy, case.x, row, col, case.grid.block, case.geometry)

    def sketch(self, case: AnyCase, u: Tensor, v: Tensor) -> Tensor:
        return self.kernels(case).sketch(case.dy, case.x, u, v, case.grid.block, case.geometry)

    def check(self, case: AnyCase) -> None:
        """Compare all products with the oracle."""
        check_kernels(self.backend, case)

    def check_scores(self, case: AnyCase) -> None:
        """Compare the norms of all blocks, those of every block chosen, and a sketch with the oracle."""
        u, v = directions(case, 3)
        check_norms(case, self.all_norms(case))
        check_norms(case, self.chosen_norms(case, *all_cells(case)))
        check_sketch(case, self.sketch(case, u, v), u, v)


def directions(case: AnyCase, pairs: int) -> tuple[Tensor, Tensor]:
    """Return ``u`` and ``v`` of a sketch: signs."""
    return signs(pairs, case.grid.out_features, 0), signs(pairs, case.grid.in_features, 1)
