"""Initial topologies: random, balanced, from a mask, from the block norms of a dense weight."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekern.topology.absent import sample_absent
from sparsekern.topology.arguments import check_whole
from sparsekern.topology.dense import dense_block_norms
from sparsekern.topology.grid import Grid
from sparsekern.topology.tied import check_multiple, one_tap, tie
from sparsekern.topology.topology import Topology, from_keys

ROUNDS = 12
"""Rounds of swaps in :func:`balanced`; each offers every block a new partner once."""


def check_count(grid: Grid, blocks: int) -> int:
    """Return ``blocks`` as Python's int; raise ValueError unless it is between 1 and the number of cells.

    Raises:
        TypeError: ``blocks`` is no whole number.
    """
    blocks = check_whole("blocks", blocks)
    if not 1 <= blocks <= grid.cells:
        raise ValueError(
            f"{blocks} blocks were asked for in a grid of {grid.rows} x {grid.cols} blocks of {grid.block}; "
            f"it must be 1 to {grid.cells}: change the sparsity or the block size"
        )
    return blocks


def random(grid: Grid, blocks: int, generator: torch.Generator) -> Topology:
    """Draw exactly ``blocks`` cells, every set equally likely. Rows and columns may stay empty."""
    check_count(grid, blocks)
    nothing = torch.empty(0, dtype=torch.int64, device="cpu")
    return from_keys(grid, sample_absent(nothing, grid.cells, blocks, generator).sort().values, checked=True)


def balanced(grid: Grid, blocks: int, generator: torch.Generator) -> Topology:
    """Draw exactly ``blocks`` cells such that block rows differ by at most one block, and block columns likewise.

    A random graph at high sparsity leaves block rows empty, and an empty block row is ``bo`` dead outputs.

    Starts from a cyclic pattern under random row and column orders, then swaps the columns of random pairs of blocks
    (which keeps all degrees) until the pattern is gone.
    """
    check_count(grid, blocks)
    if 2 * blocks > grid.cells:  # the complement of a balanced topology is balanced, and swaps find room in it
        empty = _balanced_keys(grid, grid.cells - blocks, generator)
        full = torch.ones(grid.cells, dtype=torch.bool, device="cpu")
        full[empty] = False
        return from_keys(grid, full.nonzero().squeeze(1), checked=True)
    return from_keys(grid, _balanced_keys(grid, blocks, generator).sort().values, checked=True)


def _balanced_keys(grid: Grid, blocks: int, generator: torch.Generator) -> Tensor:
    rows, cols = grid.rows, grid.cols
    row_order = torch.randperm(rows, generator=generator, device="cpu")
    col_order = torch.randperm(cols, generator=generator, device="cpu")
    degree = torch.full((rows,), blocks // rows, device="cpu")
    degree[: blocks % rows] += 1
    entry = torch.arange(blocks, device="cpu")
    row = row_order.repeat_interleave(degree, output_size=blocks)
    keys = row * cols + col_order[entry % cols]  # at most cols in a row: no cell twice
    for _ in range(ROUNDS):
        keys = _swap_columns(keys, cols, generator)
    return keys


def _swap_columns(keys: Tensor, cols: int, generator: torch.Generator) -> Tensor:
    """Pair the blocks at random and let each pair exchange columns where both new cells are empty and wanted once."""
    half = keys.shape[0] // 2
    order = torch.randperm(keys.shape[0], generator=generator, device="cpu")
    first, second = keys[order[:half]], keys[order[half : 2 * half]]
    wanted = torch.cat([first - first % cols + second % cols, second - second % cols + first % cols])
    taken = torch.isin(wanted, keys)
    ordered, position = wanted.sort()
    repeated = torch.zeros_like(taken)
    same = ordered[1:] == ordered[:-1]
    repeated[position[1:][same]] = True
    repeated[position[:-1][same]] = True
    refused = (taken | repeated).view(2, half).any(0).repeat(2)
    keys = keys.clone()
    pair = order[: 2 * half]
    keys[pair] = torch.where(refused, keys[pair], wanted)
    return keys


def from_mask(grid: Grid, mask: Tensor) -> Topology:
    """Take the cells where ``mask (R, C)`` is true, in row-major order.

    Raises:
        ValueError: the shape is not that of the grid (a mask over elements is not accepted), or no cell is true.
    """
    if tuple(mask.shape) != (grid.rows, grid.cols):
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}; it must have one entry a block, ({grid.rows}, {grid.cols})"
        )
    keys = mask.bool().flatten().nonzero().squeeze(1)
    check_count(grid, keys.shape[0])
    return from_keys(grid, keys, checked=True)


def by_norm(grid: Grid, weight: Tensor, blocks: int, tie_taps: bool = False) -> Topology:
    """Take the ``blocks`` blocks of largest Frobenius norm in a dense ``weight``; ties go to the first.

    With ``tie_taps`` the norm is that of a block of channels over all taps, and ``blocks`` a multiple of the taps.
    The weight is ``(out, in)``, or ``(Cout, Cin / groups, kh, kw)`` of a convolution.

    Raises:
        ValueError: too few or too many blocks, a weight of another shape, or NaN in it.
    """
    check_count(grid, blocks)
    norms = dense_block_norms(grid, weight)
    if tie_taps:
        check_multiple(grid, blocks)
        norms = norms.unflatten(1, (grid.taps, grid.tap_cols)).norm(dim=1)
        blocks //= grid.taps
    norms = norms.flatten()
    if bool(norms.isnan().any()):
        raise ValueError("the weight holds NaN; its blocks have no order of strength")
    keys = norms.sort(descending=True, stable=True).indices[:blocks]
    keys = keys.sort().values
    drawn = from_keys(one_tap(grid) if tie_taps else grid, keys, checked=True)
    return tie(drawn, grid) if tie_taps else drawn
