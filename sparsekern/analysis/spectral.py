"""Spectral measures of how well the blocks of a layer connect its inputs with its outputs.

They are singular values of the *block graph*: its vertices are block columns (left) and block rows (right), its edges
stored blocks. In the graph of single elements all singular values would be ``sqrt(bo * bi)`` times as large and the
bound only about ``sqrt(b)`` times, so every topology would seem badly connected. Vertices without an edge are left out.

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
"""Minimum degree for the bound to be meaningful, and minimum number of vertices of a regular subgraph."""

DENSE_CELLS = 2**22
"""Number of cells up to which all singular values are computed; for larger graphs only the two largest."""

ITERATIONS = 500


@dataclass(frozen=True)
class Spectral:
    """Measures of one layer; None if a mean degree is below 3, or no degree is shared by three vertices.

    Attributes:
        ramanujan_gap: ``sqrt(dl - 1) + sqrt(dr - 1) - s2``, with the mean degrees left and right and the second
            singular value of the graph. At 0 or more the graph is as well connected as a Ramanujan graph.
        weighted_gap: ``s1 - s2`` of the matrix of the blocks' Frobenius norms.
        mean_ramanujan_gap: mean of the gap over regular subgraphs, one for each degree of 3 or more that at least three
            block columns share: these columns with all block rows.
        mean_weighted_gap: mean of the weighted gap over the same subgraphs.
    """

    ramanujan_gap: float | None
    weighted_gap: float | None
    mean_ramanujan_gap: float | None
    mean_weighted_gap: float | None


def spectral(layer: BlockSparse) -> Spectral:
    """Return the measures of a sparse layer (synchronises the device).

    In a convolution each group has its own block columns, and so has each tap, as in the weight matrix.
    """
    grid, used = layer.grid, layer.topology.used()
    norms = torch.linalg.vector_norm(layer.values.detach().double(), dim=(1, 2))[used].cpu()
    right = layer.row[used].long().cpu()
    left = layer.col[used].long().cpu() + right // grid.group_rows * grid.cols
    return measure(left, right, norms)


def measure(left: Tensor, right: Tensor, weights: Tensor) -> Spectral:
    """Return the measures of a bipartite graph from its edges ``(E,)``: left and right vertices, and weights."""
    whole = _gaps(left, right, weights)
    parts = [_gaps(left[of], right[of], weights[of]) for of in _regular(left)]
    known = [gaps for gaps in parts if gaps is not None]
    means = tuple(sum(gaps[i] for gaps in known) / len(known) for i in (0, 1)) if known else (None, None)
    return Spectral(*(whole or (None, None)), *means)


def _regular(left: Tensor) -> list[Tensor]:
    """Return a mask of edges ``(E,)`` for each regular subgraph: those of the left vertices with one degree."""
    _, vertex, degree = left.unique(return_inverse=True, return_counts=True)
    values, shared = degree.unique(return_counts=True)
    wanted = values[(values >= LEAST) & (shared >= LEAST)].tolist()
    return [degree[vertex] == d for d in wanted]


def _gaps(left: Tensor, right: Tensor, weights: Tensor) -> tuple[float, float] | None:
    """Return the Ramanujan gap and the weighted gap; None if a mean degree is too small."""
    edges = left.shape[0]
    if edges == 0:
        return None
    left, right = (side.unique(return_inverse=True)[1] for side in (left, right))  # drops vertices without an edge
    sides = (int(left.max()) + 1, int(right.max()) + 1)
    degrees = [edges / side for side in sides]
    if min(degrees) < LEAST:
        return None
    bound = sum(math.sqrt(degree - 1) for degree in degrees)
    _, second = two_largest(left, right, torch.ones_like(weights), sides)
    first_weighted, second_weighted = two_largest(left, right, weights, sides)
    return bound - second, first_weighted - second_weighted


def two_largest(left: Tensor, right: Tensor, weights: Tensor, sides: tuple[int, int]) -> tuple[float, float]:
    """Return the two largest singular values of a matrix of size ``sides`` with these entries ``(E,)``, float64."""
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
