"""The tensors of a case: a layer whose blocks have just been moved at random, as in the middle of a training.

So the slots are in no order, and the index is the one that :meth:`SparseLinear.move_` rebuilt.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.cpu.cases import Case
from bench.gpu import scene
from bench.gpu.scene import DTYPES
from sparsekern import SparseLinear
from sparsekern.topology import sample_absent

MOVED = 0.3
"""Fraction of the blocks that are moved."""


@dataclass(frozen=True)
class Scene(scene.Scene):
    """Tensors of a case, and the exact answers. ``(T, I)``, ``(T, O)``, ``(Z, b, b)``, ``(O, I)``."""

    layer: SparseLinear


def make_scene(case: Case, seed: int = 0) -> Scene:
    """Draw the layer and the numbers of a case from a seed. The block size divides the shape."""
    layer = SparseLinear(
        case.in_features,
        case.out_features,
        bias=False,
        dtype=DTYPES[case.dtype],
        sparsity=case.sparsity,
        block_size=case.block,
        init="random",
        seed=seed,
    )
    generator = torch.Generator().manual_seed(seed)
    move_at_random(layer, generator)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DTYPES[case.dtype])

    with torch.no_grad():
        layer.values.copy_(numbers(*layer.values.shape))
    grid, values = layer.grid, layer.values.detach()
    weight = torch.zeros(case.out_features, case.in_features, dtype=values.dtype)
    cells = weight.view(grid.rows, case.block, grid.cols, case.block)
    cells[layer.row.long(), :, layer.col.long(), :] = values
    return Scene(
        grid=grid,
        row=layer.row,
        col=layer.col,
        index=layer.index,
        x=numbers(case.tokens, case.in_features),
        dy=numbers(case.tokens, case.out_features),
        values=values,
        weight=weight,
        layer=layer,
    )


def move_at_random(layer: SparseLinear, generator: torch.Generator) -> None:
    """Move :data:`MOVED` of the blocks to places that were empty."""
    slots = torch.randperm(layer.values.shape[0], generator=generator)
    slots = slots[: min(int(MOVED * len(slots)), layer.grid.cells - len(slots))]
    keys = sample_absent(layer.topology.sorted_keys(), layer.grid.cells, len(slots), generator)
    layer.move_(slots, (keys // layer.grid.cols).int(), (keys % layer.grid.cols).int())
