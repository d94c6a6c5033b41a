"""How well the blocks of a layer connect its inputs with its outputs: singular values of its bipartite graph.

A vertex is a block column (left) or a block row (right), an edge a stored block: the *block graph*. The graph of single
elements would multiply all singular values by ``sqrt(bo * bi)`` and the bound only by about ``sqrt(b)``, so that blocks
of any topology looked badly connected. Vertices without an edge are left out.

Sources: Hoang et al., "Revisiting Pruning at Initialization through the Lens of Ramanujan Graph", ICLR 2023 (the gaps
and their means over regular subgraphs); Thangarasa et al., "Sparse-IFT", ICML 2024, who follow them over training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekern.nn import BlockSparse

LEAST = 3
"""Degree below which the bound says nothing, and vertices that make a regular subgraph."""

DENSE_CELLS = 2**22
"""Cells of a block graph up to which all singular values are computed; of larger ones the two largest."""

ITERATIONS = 500


@dataclass(frozen=True)
class Spectral:
    """Measures of one layer; None where a mean degree is below 3, or no degree is shared by three vertices.

    Attributes:
        ramanujan_gap: ``sqrt(dl - 1) + sqrt(dr - 1) - s2``: mean degrees left and right, and the second singular value
            of the graph. 0 or more: as well connected as a Ramanujan graph.
        weighted_gap: ``s1 - s2`` of the matrix of the blocks' Frobenius norms.
        mean_ramanujan_gap: the mean of the gap over subgraphs, one for each degree of 3 or more that three block
            columns or more share: these columns with all block rows.
        mean_weighted_gap: the same of the weighted gap.
    """

    ramanujan_gap: float | None
    weighted_gap: float | None
    mean_ramanujan_gap: float | None
    mean_weighted_gap: float | None


def spectral(layer: BlockSparse) -> Spectral:
    """Return the measures of a sparse layer as it is now (waits for the device).

    Each group of a convolution has block columns of its own; taps are columns of their own, as in the weight matrix.
    """
    grid, used = layer.grid, layer.topology.used()
    norms = torch.linalg.vector_norm(layer.values.detach().double(), dim=(1, 2))[used].cpu()
    right = layer.row[used].long().cpu()
    left = layer.col[used].long().cpu() + right // grid.group_rows * grid.cols
    return measure(left, right, norms)


def measure(left: Tensor, right: Tensor, weights: Tensor) -> Spectral:
    """Return the measures of a bipartite graph from its edges ``(E,)``: vertices on both sides, and weights."""
    whole = _gaps(left, right, weights)
    parts = [_gaps(left[of], right[of], weights[of]) for of in _regular(left)]
    known = [gaps for gaps in parts if gaps is not None]
    means = tuple(sum(gaps[i] for gaps in known) / len(known) for i in (0, 1)) if known else (None, None)
    return Spectral(*(whole or (None, None)), *means)


def _regular(left: Tensor) -> list[Tensor]:
    """Return of each degree that makes a regular subgraph the edges ``(E,)`` bool of its left vertices."""
    _, vertex, degree = left.unique(return_inverse=True, return_counts=True)
    values, shared = degree.unique(return_counts=True)
    wanted = values[(values >= LEAST) & (shared >= LEAST)].tolist()
    return [degree[vertex] == d for d in wanted]


def _gaps(left: Tensor, right: Tensor, weights: Tensor) -> tuple[float, float] | None:
    """Return the Ramanujan gap and the weighted gap; None where a mean degree is too small."""
    edges = left.shape[0]
    if edges == 0:
        return None
    left, right = (side.unique(return_inverse=True)[1] for side in (left, right))  # no vertex without an edge
    sides = (int(left.max()) + 1, int(right.max()) + 1)
    degrees = [edges / side for side in sides]
    if min(degrees) < LEAST:
        return None
    bound = sum(math.sqrt(degree - 1) for degree in degrees)
    _, second = two_largest(left, right, torch.ones_like(weights), sides)
    first_weighted, second_weighted = two_largest(left, right, weights, sides)
    return bound - second, first_weighted - second_weighted


def two_largest(left: Tensor, right: Tensor, weights: Tensor, sides: tuple[int, int]) -> tuple[float, float]:
    """Return the two largest singular values of the ``sides`` matrix with these entries, float64 ``(E,)``."""
    if sides[0] * sides[1] <= DENSE_CELLS:
        matrix = torch.zeros(sides, dtype=torch.float64, device="cpu").index_put_((left, right), weights)
        values = torch.linalg.svdvals(matrix)
    else:
        # The largest eigenvalues of [[0, M], [M', 0]] are the singular values of M.
        places = torch.stack([torch.cat([left, right + sides[0]]), torch.cat([right + sides[0], left])])
        adjacency = torch.sparse_coo_tensor(
            places, weights.repeat(2), (sum(sides), sum(sides)), check_invariants=False
        ).coalesce()
        generator = torch.Generator("cpu").manual_seed(0)
        start = torch.randn(sum(sides), 4, dtype=torch.float64, generator=generator, device="cpu")
        values, _ = torch.lobpcg(adjacency, 4, X=start, niter=ITERATIONS, tol=1e-5, largest=True)
    return float(values[0]), float(values[1]) if values.numel() > 1 else 0.0
