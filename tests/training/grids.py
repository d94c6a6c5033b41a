"""A layer of 4 x 4 blocks that is worked by hand, and what the tests of methods do with it.

norms, and their slots     norms of the gradient's blocks: SCORES     those of ``step``: G down, F across
  9:0   .   1:1   .            1  6  9  2                                 4   3.5   2   1
   .   2:2   .    .            0  8  3  4                                 8   7     4   2
   .    .    .   8:3           5  1  7  9                                12  10.5   6   3
  3:4   .    .   4:5           2  3  6  1                                16  14     8   4
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import sparsekern as sk
from sparsekern.nn import BlockSparse
from sparsekern.topology import Grid, from_mask

NORMS = torch.tensor([9.0, 1, 2, 8, 3, 4])
MASK = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1], [1, 0, 0, 1]])
SCORES = torch.tensor([[1.0, 6, 9, 2], [0, 8, 3, 4], [5, 1, 7, 9], [2, 3, 6, 1]])
G, F = [1.0, 2, 3, 4], [4.0, 3.5, 2, 1]


def grid_layer(block: int = 2, capacity: int = 6) -> sk.SparseLinear:
    """The layer above, with entries that are equal within a block."""
    side = 4 * block
    layer = sk.SparseLinear(side, side, topology=from_mask(Grid(side, side, (block, block)), MASK), capacity=capacity)
    with torch.no_grad():
        layer.values[:6] = NORMS.view(6, 1, 1) / block  # the norm of four equal entries is twice the entry
    return layer


def over(model: nn.Module, kind: type, **options: Any) -> Any:
    """A method that updates after each step, of which the optimizer changes nothing."""
    return kind(model, torch.optim.SGD(model.parameters(), lr=0.0), **{"update_every": 1} | options)


def advance(method: sk.Method) -> bool:
    """End a step: the optimizer's part and the method's; whether blocks moved."""
    method.optimizer.step()
    method.optimizer.zero_grad()
    return method.step()


def step(layer: sk.SparseLinear, method: sk.Method, g: Sequence[float] = G) -> bool:
    """A step with the gradient ``g_J * f_I`` in one element of each block, of which sketches are exact."""
    block = layer.block_size[0]
    x, dy = torch.zeros(1, 4 * block), torch.zeros(1, 4 * block)
    x[0, ::block], dy[0, ::block] = torch.tensor(F), torch.tensor(g)
    layer(x).backward(dy)
    return advance(method)


def ask_for(layer: sk.SparseLinear, scores: Tensor = SCORES) -> None:
    """Run a backward in which the norms of the gradient's blocks are ``scores``: x = 1, one token a feature."""
    bo, bi = layer.block_size
    dy = (scores / (bo * bi) ** 0.5).repeat_interleave(bo, 0).repeat_interleave(bi, 1).T
    layer(torch.eye(4 * bi)).backward(dy.contiguous())


def changed(layer: BlockSparse, update: Callable[[], bool]) -> list[int]:
    """Return the slots whose blocks an update moved, which must say whether it moved any."""
    before = layer.topology.keys().clone()
    said = update()
    slots = (layer.topology.keys() != before).nonzero().flatten().tolist()
    assert said == bool(slots)
    return slots


def free(layer: BlockSparse) -> list[int]:
    return (layer.row < 0).nonzero().flatten().tolist()


def places(layer: BlockSparse, slots: Sequence[int] | None = None) -> list[tuple[int, int]]:
    """The row and column of each slot."""
    found = list(zip(layer.row.tolist(), layer.col.tolist(), strict=True))
    return found if slots is None else [found[slot] for slot in slots]
