"""Draws of cells as pairs (row, column) from two distributions, so that the joint one is never formed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsekern.topology.places import places_for

ROUNDS = 8
"""How often :func:`sample_absent_pairs` draws again; each round draws at most twice as many as the one before."""

CHUNK = 2**15
"""Pairs that are drawn at a time: what a draw takes then stays in the cache."""


def sample_pairs(rows: Tensor, cols: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw ``count`` cells independently, cell ``(r, c)`` with probability ``rows[r] cols[c]`` over the sum of all.

    Args:
        rows: ``(R,)`` weights, not negative; they need not add up to 1.
        cols: ``(C,)`` weights, likewise; or ``(G, C)`` where the rows are in G equal groups that weigh columns apart.
            Some cell has a weight above 0.
        count: how many to draw, with replacement.
        generator: a CPU generator.

    Returns:
        ``(count,)`` int32 keys ``row * C + col`` on the CPU, in the order drawn; repetitions are kept.
    """
    by_row = _edges(row_weights(rows, cols))
    groups, width = cols.shape if cols.dim() == 2 else (1, cols.shape[0])
    by_col = _edges(cols.to("cpu", torch.float64).flatten())
    keys = torch.empty(count, dtype=torch.int32, device="cpu")
    for some in keys.split(CHUNK):
        row = _sample(by_row[1:], by_row[0], by_row[-1], some.shape[0], generator)
        if groups == 1:
            col = _sample(by_col[1:], by_col[0], by_col[-1], some.shape[0], generator)
        else:
            first = row // (rows.shape[0] // groups) * width  # of the columns as the group of the row weighs them
            col = _sample(by_col[1:], by_col[first], by_col[first + width], some.shape[0], generator) - first
        torch.add(row * width, col, out=some)
    return keys


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
    drawn = torch.rand(count, dtype=torch.float64, device="cpu", generator=generator)
    drawn.mul_(high - low).add_(low).clamp_(max=high.nextafter(low))  # the sum may round up to high
    return places_for(edges).search(edges, drawn)


def sample_absent_pairs(present: Tensor, rows: Tensor, cols: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw up to ``count`` distinct cells outside ``present``, one after the other from :func:`sample_pairs`.

    What is drawn again or present is dropped. Fewer come back when the weights leave too few cells within reach.

    Args:
        present: ``(n,)`` distinct keys to avoid, ascending.
        rows, cols, count, generator: as in :func:`sample_pairs`.

    Returns:
        ``(count,)`` or fewer int32 keys on the CPU, in the order drawn.
    """
    present, cells = present.to("cpu", torch.int32), rows.shape[0] * cols.shape[-1]
    drawn = torch.empty(0, dtype=torch.int32, device="cpu")
    more = 16 + count * 5 // 4
    for _ in range(ROUNDS if count else 0):
        before = drawn.shape[0]
        drawn = torch.cat([drawn, sample_pairs(rows, cols, more, generator)])
        drawn = drawn[places_for(drawn).first_occurrences(drawn, present, cells)]
        if drawn.shape[0] >= count:
            break
        useful = (drawn.shape[0] - before) / more  # of the draws; of the next ones fewer will be
        more = min(2 * more, 16 + int(1.5 * (count - drawn.shape[0]) / max(useful, 1e-9)))
    return drawn[:count]


def distinct_absent(keys: Tensor, present: Tensor, cells: int) -> Tensor:
    """Return the different ones of ``keys (n,)`` that are not in ``present (m,)``, ascending.

    All are int32 and below ``cells``, the present ones distinct and ascending.
    """
    return places_for(keys, present).distinct(keys, present, cells)


def are_absent(keys: Tensor, present: Tensor, cells: int) -> Tensor:
    """Return ``(n,)`` bool for ``keys (n,)``: it is not in ``present (m,)``, which are distinct and ascending.

    All are below ``cells``.
    """
    keys, present = keys.int(), present.int()
    return places_for(keys, present).find(present, keys, cells) < 0
