"""Draws of cells as pairs (row, column) from two distributions, so that the joint one is never formed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsekern.topology.absent import first_occurrences

ROUNDS = 8
"""How often :func:`sample_absent_pairs` draws again; each round draws twice as many as the one before."""


def sample_pairs(rows: Tensor, cols: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw ``count`` cells independently, cell ``(r, c)`` with probability ``rows[r] cols[c]`` over the sum of all.

    Args:
        rows: ``(R,)`` weights, not negative; they need not add up to 1.
        cols: ``(C,)`` weights, likewise; or ``(G, C)`` where the rows are in G equal groups that weigh columns apart.
            Some cell has a weight above 0.
        count: how many to draw, with replacement.
        generator: a CPU generator.

    Returns:
        ``(count,)`` int64 keys ``row * C + col`` on the CPU, in the order drawn; repetitions are kept.
    """
    by_row = _edges(row_weights(rows, cols))
    row = _sample(by_row[1:], by_row[0], by_row[-1], count, generator)
    groups, width = cols.shape if cols.dim() == 2 else (1, cols.shape[0])
    by_col = _edges(cols.to("cpu", torch.float64).flatten())
    first = row // (rows.shape[0] // groups) * width  # of the columns as the group of the row weighs them
    col = _sample(by_col[1:], by_col[first], by_col[first + width], count, generator) - first
    return row * width + col


def row_weights(rows: Tensor, cols: Tensor) -> Tensor:
    """Return what all cells of each row weigh together, ``(R,)`` float64 on the CPU.

    ``rows`` and ``cols`` are those of :func:`sample_pairs`.
    """
    together = cols.to("cpu", torch.float64).sum(-1)
    each = together if cols.dim() == 1 else together.repeat_interleave(rows.shape[0] // cols.shape[0])
    return rows.to("cpu", torch.float64) * each


def _edges(weights: Tensor) -> Tensor:
    """Return the cumulative weights with a zero before them."""
    return pad(weights.cumsum(0), (1, 0))


def _sample(edges: Tensor, low: Tensor, high: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Invert cumulative weights from ``low`` to below ``high``: a category of weight zero has no width, and no draw."""
    uniform = torch.rand(count, dtype=torch.float64, device="cpu", generator=generator)
    drawn = torch.minimum(low + uniform * (high - low), high.nextafter(low))  # the sum may round up to high
    return torch.searchsorted(edges, drawn, right=True)


def sample_absent_pairs(present: Tensor, rows: Tensor, cols: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw up to ``count`` distinct cells outside ``present``, one after the other from :func:`sample_pairs`.

    What is drawn again or present is dropped. Fewer come back when the weights leave too few cells within reach.

    Args:
        present: ``(n,)`` distinct keys to avoid, ascending.
        rows, cols, count, generator: as in :func:`sample_pairs`.

    Returns:
        ``(count,)`` or fewer int64 keys on the CPU, in the order drawn.
    """
    present = present.to("cpu", torch.int64)
    drawn = torch.empty(0, dtype=torch.int64, device="cpu")
    more = 16 + count * 5 // 4
    for _ in range(ROUNDS if count else 0):
        fresh = without(sample_pairs(rows, cols, more, generator), present)
        drawn = first_occurrences(torch.cat([drawn, fresh]))
        if drawn.shape[0] >= count:
            break
        more *= 2
    return drawn[:count]


def without(keys: Tensor, present: Tensor) -> Tensor:
    """Return those of ``keys (n,)`` that are not in ``present (m,)``, which is ascending; the order stays."""
    return keys[are_absent(keys, present)]


def are_absent(keys: Tensor, present: Tensor) -> Tensor:
    """Return ``(n,)`` bool for ``keys (n,)``: it is not in ``present``, which is ascending and of the same dtype."""
    if present.shape[0] == 0:
        return torch.ones_like(keys, dtype=torch.bool)
    near = torch.searchsorted(present, keys, out_int32=True).clamp_(max=present.shape[0] - 1)
    return present[near] != keys
