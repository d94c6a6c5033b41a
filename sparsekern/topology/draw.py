"""Initial topologies: the number of blocks of each layer, and where they are.

Places are random, balanced, from a mask, or from scores of the blocks of a dense weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sparsekern.errors import InputError
from sparsekern.topology.arguments import check_choice, check_number, check_whole
from sparsekern.topology.blocks import dense_block_norms
from sparsekern.topology.grid import Grid
from sparsekern.topology.sampling import sample_absent
from sparsekern.topology.topology import Topology, check_multiple, from_keys, one_tap, places_for, tie

LARGE = 16 * 16
"""Block size in elements from which :func:`balanced` swaps blocks, which is slow and takes 200 bytes per block."""

ROUNDS = 12
"""Rounds of swaps in :func:`balanced`; in each, every block is paired once."""


def check_count(grid: Grid, blocks: int) -> int:
    """Return ``blocks`` as an int, after checking that the grid can hold that many.

    Raises:
        TypeError: ``blocks`` is not a whole number.
        ValueError: ``blocks`` is not between 1 and the number of cells.
    """
    blocks = check_whole("blocks", blocks)
    if not 1 <= blocks <= grid.cells:
        raise InputError(
            f"{blocks} blocks were asked for in a grid of {grid.rows} x {grid.cols} blocks of {grid.block}; "
            f"it must be 1 to {grid.cells}: change the sparsity or the block size",
            parameter="blocks",
        )
    return blocks


def random(grid: Grid, blocks: int, generator: torch.Generator) -> Topology:
    """Draw ``blocks`` cells; every set is equally likely. Block rows and columns may stay empty."""
    check_count(grid, blocks)
    keys = sample_absent(_no_keys(), grid.cells, blocks, generator)
    return from_keys(grid, _ascending(keys, grid.cells), checked=True)


def balanced(grid: Grid, blocks: int, generator: torch.Generator) -> Topology:
    """Draw ``blocks`` cells such that block rows differ by at most one block, and so do block columns.

    At high sparsity a random topology leaves some block rows empty, and an empty block row is ``bo`` dead outputs.

    Cells are drawn uniformly; then random blocks move from block rows with too many to random ones with too few, and
    likewise for block columns. All orders of rows and columns are equally likely. Large blocks (:data:`LARGE`), of
    which there are few, start from a cyclic pattern under random row and column orders instead, and random pairs of
    blocks swap columns until the pattern is gone.
    """
    check_count(grid, blocks)
    draw = _swapped_keys if grid.block[0] * grid.block[1] >= LARGE else _levelled_keys
    if 2 * blocks <= grid.cells:
        return from_keys(grid, _ascending(draw(grid, blocks, generator), grid.cells), checked=True)
    # The complement of a balanced topology is balanced, and drawing fewer blocks is easier.
    empty = _ascending(draw(grid, grid.cells - blocks, generator), grid.cells)
    every = torch.arange(grid.cells, dtype=torch.int32, device="cpu")
    return from_keys(grid, places_for(every).leave_out_(every, empty.long()), checked=True)


def _no_keys() -> Tensor:
    return torch.empty(0, dtype=torch.int32, device="cpu")


def _ascending(keys: Tensor, cells: int) -> Tensor:
    """Return distinct keys ``(n,)`` ascending, int32; the native library counts instead of sorting."""
    keys = keys.int()
    return places_for(keys).distinct(keys, _no_keys(), cells)


def _levelled_keys(grid: Grid, blocks: int, generator: torch.Generator) -> Tensor:
    """Draw the keys ``(blocks,)`` of a balanced topology, in any order, in time and memory linear in the blocks."""
    rows, cols, cells = grid.rows, grid.cols, grid.cells
    keys = sample_absent(_no_keys(), cells, blocks, generator, ordered=True)
    keys = _transposed(_level_(keys, rows, cols, generator), rows, cols)
    keys = _level_(_ascending(keys, cells), cols, rows, generator)
    return _transposed(keys, cols, rows)


def _transposed(keys: Tensor, rows: int, cols: int) -> Tensor:
    """Return the keys of the same cells in the transposed grid."""
    row, col = places_for(keys).places_of(keys, cols)
    return col.mul_(rows).add_(row)


def _level_(keys: Tensor, rows: int, cols: int, generator: torch.Generator) -> Tensor:
    """Move keys from rows with too many to rows with too few, each within its column; return them in any order.

    Args:
        keys: ``(n,)`` distinct int32 keys ``row * cols + col``, ascending; overwritten.
        rows, cols: numbers of block rows and columns, of the grid or of its transpose.
        generator: a CPU generator.
    """
    starts = torch.searchsorted(keys, torch.arange(rows + 1, dtype=torch.int32, device="cpu") * cols)
    count = starts.diff()
    wanted = torch.full_like(count, keys.shape[0] // rows)
    wanted[torch.randperm(rows, generator=generator, device="cpu")[: keys.shape[0] % rows]] += 1
    row, surplus = torch.arange(rows, device="cpu"), count - wanted
    giving = row.repeat_interleave(surplus.clamp(min=0))
    taking = row.repeat_interleave(surplus.neg().clamp_(min=0))
    moved, new = _no_keys().long(), _no_keys()  # positions in keys, and the keys that go there
    while giving.shape[0]:
        # A row with too many has a column that one with too few lacks, so the loop ends with probability 1.
        giving = giving[torch.randperm(giving.shape[0], generator=generator, device="cpu")]  # taking: local reads
        among = torch.rand(giving.shape[0], dtype=torch.float64, generator=generator, device="cpu")
        at = starts[giving] + (among * count[giving]).long()
        to = (taking * cols + keys[at] % cols).int()
        possible = keys[torch.searchsorted(keys, to).clamp_(max=keys.shape[0] - 1)] != to
        possible &= _are_new(moved, at, keys.shape[0]) & _are_new(new, to, rows * cols)
        moved, new = torch.cat([moved, at[possible]]), torch.cat([new, to[possible]])
        giving, taking = giving[~possible], taking[~possible]
    return keys.index_copy_(0, moved, new)


def _are_new(former: Tensor, numbers: Tensor, bound: int) -> Tensor:
    """Return ``(n,)`` bool: whether a number, below ``bound``, occurs for the first time and is not in ``former``."""
    together = torch.cat([former, numbers]).int()
    return places_for(together).first_occurrences(together, _no_keys(), bound)[former.shape[0] :]


def _swapped_keys(grid: Grid, blocks: int, generator: torch.Generator) -> Tensor:
    """Draw the keys ``(blocks,)`` of a balanced topology, in any order, by random swaps in a cyclic pattern."""
    rows, cols = grid.rows, grid.cols
    row_order = torch.randperm(rows, generator=generator, device="cpu")
    col_order = torch.randperm(cols, generator=generator, device="cpu")
    degree = torch.full((rows,), blocks // rows, device="cpu")
    degree[: blocks % rows] += 1
    entry = torch.arange(blocks, device="cpu")
    row = row_order.repeat_interleave(degree, output_size=blocks)
    keys = row * cols + col_order[entry % cols]  # a row has at most cols blocks, so no cell occurs twice
    for _ in range(ROUNDS):
        keys = _swap_columns(keys, cols, generator)
    return keys


def _swap_columns(keys: Tensor, cols: int, generator: torch.Generator) -> Tensor:
    """Pair the blocks at random; each pair swaps columns if both new cells are empty and no other pair wants them."""
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
    """Return the topology of the cells where a mask is true, in row-major order.

    Args:
        grid: the grid.
        mask: ``(R, C)``, one entry per block; a mask over elements is not accepted.

    Raises:
        ValueError: the mask has another shape, or no cell is true.
    """
    if tuple(mask.shape) != (grid.rows, grid.cols):
        raise InputError(
            f"mask has shape {tuple(mask.shape)}; it must have one entry per block, ({grid.rows}, {grid.cols})",
            parameter="mask",
        )
    keys = mask.bool().flatten().nonzero().squeeze(1)
    check_count(grid, keys.shape[0])
    return from_keys(grid, keys, checked=True)


def by_norm(grid: Grid, weight: Tensor, blocks: int, tie_taps: bool = False) -> Topology:
    """Return the topology of the blocks of largest Frobenius norm in a dense weight; ties go to the first.

    Args:
        grid: the grid.
        weight: the dense weight, ``(out, in)`` or ``(Cout, Cin / groups, kh, kw)``.
        blocks: number of blocks.
        tie_taps: rank blocks of channels by their norm over all taps; ``blocks`` must be a multiple of the taps.

    Raises:
        ValueError: ``blocks`` does not fit the grid, or the weight has another shape or holds NaN.
    """
    check_count(grid, blocks)
    norms = dense_block_norms(grid, weight)
    if tie_taps:
        check_multiple(grid, blocks)
        norms = norms.unflatten(1, (grid.taps, grid.tap_cols)).norm(dim=1)
    if bool(norms.isnan().any()):
        raise InputError("weight holds NaN, so its blocks cannot be ranked; load another one", parameter="weight")
    return by_score(grid, norms, blocks, tie_taps)


def by_score(grid: Grid, scores: Tensor, blocks: int, tie_taps: bool = False) -> Topology:
    """Return the topology of the blocks of highest score; ties go to the first.

    Args:
        grid: the grid.
        scores: ``(R, C)``, one for each block, none of them NaN; with tied taps ``(R, C / taps)``, one for all taps.
        blocks: number of blocks; with tied taps a multiple of the taps.
        tie_taps: store a block of channels in all taps or in none.
    """
    places = one_tap(grid) if tie_taps else grid
    keys = scores.flatten().sort(descending=True, stable=True).indices[: blocks * places.cells // grid.cells]
    drawn = from_keys(places, keys.sort().values, checked=True)
    return tie(drawn, grid) if tie_taps else drawn


DISTRIBUTIONS = ("uniform", "er", "er-matrix", "erk")


def allocate(grids: Sequence[Grid], sparsity: float, distribution: str = "uniform") -> list[int]:
    """Return the number of blocks of each layer; all together they are ``round((1 - sparsity) * cells)``.

    ``uniform`` gives all layers the same density. The other distributions give linear layers blocks in proportion to
    ``R + C`` (Erdos-Renyi; Mocanu et al. 2018), and convolutions with ``taps = kh * kw`` in proportion to:

    * ``er`` (Evci et al. 2020, section 3): ``taps * (R + CB)``; each tap counts as a linear layer.
    * ``er-matrix`` (the code of Heddes et al. 2024): ``R + taps * CB``; the matrix is ``Cout x (taps * Cin)``.
    * ``erk`` (Evci et al. 2020, section 3): ``R + CB + (kh + kw) / sqrt(bo * bi)``; the kernel is scaled to the unit of
      the other terms, and with 1x1 blocks this is the formula of the paper.

    Blocks that do not fit into a layer go to the others in the same proportion. Every layer gets at least one block.

    Args:
        grids: the grids of the layers.
        sparsity: fraction of all blocks together that is not stored, in [0, 1).
        distribution: ``"uniform"``, ``"er"``, ``"er-matrix"`` or ``"erk"``.

    Raises:
        ValueError: the sparsity is outside [0, 1), the distribution is unknown, or there are fewer blocks than layers.
    """
    check_sparsity(sparsity)
    check_choice("distribution", distribution, DISTRIBUTIONS)
    cells = [grid.cells for grid in grids]
    total = blocks_at(sparsity, sum(cells))
    if total < len(grids):
        raise InputError(
            f"sparsity {sparsity} leaves {total} of {sum(cells)} blocks for {len(grids)} layer(s); every layer needs "
            "at least one: lower the sparsity or use smaller blocks",
            parameter="sparsity",
        )
    shares = [share(grid, distribution) for grid in grids]
    return round_to_sum(fill(shares, [1.0] * len(grids), [float(c) for c in cells], float(total)), total)


def share(grid: Grid, distribution: str) -> float:
    """Return the number to which the blocks of a layer are proportional; see :func:`allocate`."""
    if distribution == "uniform":
        return float(grid.cells)
    if distribution == "er-matrix" or grid.kernel is None:
        return float(grid.rows + grid.cols)
    if distribution == "er":
        return float((grid.rows + grid.tap_cols) * grid.taps)
    return grid.rows + grid.tap_cols + sum(grid.kernel) / math.sqrt(grid.block[0] * grid.block[1])


def check_sparsity(sparsity: float, name: str = "sparsity") -> None:
    """Raise ValueError unless ``sparsity``, the argument ``name``, is in [0, 1); TypeError if it is no number."""
    check_number(name, sparsity, "a number in [0, 1)")
    if not 0 <= sparsity < 1:
        hint = f" (did you mean {sparsity / 100:g}?)" if 1 < sparsity < 100 else ""
        raise InputError(
            f"{name} is {sparsity}; it is the fraction absent and must be in [0, 1){hint}",
            parameter=name,
        )


def blocks_at(sparsity: float, cells: int) -> int:
    """Return ``(1 - sparsity) * cells``, rounded to the nearest integer, halves up.

    A small tolerance makes up for the rounding of decimal fractions: in floating point ``1 - 0.9`` is less than 0.1.
    """
    return math.floor(cells - sparsity * cells + 0.5 + 1e-9)


def part_of(blocks: int, fraction: float) -> int:
    """Return ``floor(fraction * blocks)``."""
    return math.floor(fraction * blocks + 1e-9)  # 0.29 * 100 is 28.999999999999996


def fill(shares: list[float], low: list[float], high: list[float], total: float) -> list[float]:
    """Return amounts in proportion to ``shares``, limited to [low, high], that add up to ``total``.

    Distributes the total in proportion, fixes the layers that break a bound, and repeats with the others. If both
    bounds are broken, the side with the larger excess is fixed first; it never has to be undone.
    """
    amounts = [0.0] * len(shares)
    open_ = list(range(len(shares)))
    left = total
    while open_:
        scale = left / sum(shares[i] for i in open_)
        above = [i for i in open_ if shares[i] * scale > high[i]]
        below = [i for i in open_ if shares[i] * scale < low[i]]
        if not above and not below:
            for i in open_:
                amounts[i] = shares[i] * scale
            break
        excess = sum(shares[i] * scale - high[i] for i in above)
        lack = sum(low[i] - shares[i] * scale for i in below)
        fixed, bound = (above, high) if excess >= lack else (below, low)
        for i in fixed:
            amounts[i] = bound[i]
            left -= bound[i]
        open_ = [i for i in open_ if i not in fixed]
    return amounts


def round_to_sum(amounts: list[float], total: int) -> list[int]:
    """Round to integers with the sum ``total``: round down, then add 1 to those with the largest remainders."""
    floors = [math.floor(amount + 1e-9) for amount in amounts]
    order = sorted(range(len(amounts)), key=lambda i: floors[i] - amounts[i])
    for i in order[: total - sum(floors)]:
        floors[i] += 1
    return floors
