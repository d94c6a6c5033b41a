"""Singular values of block graphs: by hand, against networkx and scipy, and the definitions' edges."""

from __future__ import annotations

import importlib
import math

import networkx
import numpy as np
import pytest
import scipy.sparse.linalg
import torch

import sparsekern as sk
from sparsekern.analysis import spectral
from sparsekern.analysis.spectral import measure, two_largest
from sparsekern.topology import Topology, conv_grid

MODULE = importlib.import_module("sparsekern.analysis.spectral")  # the package has the function under this name


def edges(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    left, right = mask.nonzero(as_tuple=True)
    return left, right, torch.ones(len(left), dtype=torch.float64)


def test_a_complete_graph_by_hand():
    """4 x 9: one singular value, 6; the bound is sqrt(8) + sqrt(3)."""
    found = measure(*edges(torch.ones(4, 9)))
    assert found.ramanujan_gap == pytest.approx(math.sqrt(8) + math.sqrt(3), abs=1e-12)
    assert found.weighted_gap == pytest.approx(6, abs=1e-12)
    assert found.mean_ramanujan_gap == found.ramanujan_gap and found.mean_weighted_gap == found.weighted_gap


def test_two_separate_graphs_are_badly_connected():
    """Two complete 4 x 4: both singular values are 4, above the bound."""
    mask = torch.block_diag(torch.ones(4, 4), torch.ones(4, 4))
    found = measure(*edges(mask))
    assert found.ramanujan_gap == pytest.approx(2 * math.sqrt(3) - 4) and found.ramanujan_gap < 0
    assert found.weighted_gap == pytest.approx(0, abs=1e-12)


def test_the_petersen_graph_doubled_is_ramanujan():
    """Its bipartite double cover has the singular values 3, 2 and 1: the gap is 2 sqrt(2) - 2."""
    mask = torch.from_numpy(networkx.to_numpy_array(networkx.petersen_graph()))
    assert measure(*edges(mask)).ramanujan_gap == pytest.approx(2 * math.sqrt(2) - 2)


@pytest.mark.parametrize(("rows", "cols", "density", "seed"), [(20, 30, 0.3, 0), (40, 25, 0.25, 1), (64, 64, 0.25, 2)])
def test_against_networkx_and_scipy(rows, cols, density, seed):
    """The adjacency's eigenvalues, as Hoang et al. take them: the first and the third by size."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(cols, rows, generator=generator) < density
    weights = torch.rand(cols, rows, generator=generator, dtype=torch.float64) * mask
    left, right, _ = edges(mask)
    found = measure(left, right, weights[mask])
    oracle = []
    for matrix in (mask.double().numpy(), weights.numpy()):
        graph = networkx.from_numpy_array(
            np.block([[np.zeros((cols, cols)), matrix], [matrix.T, np.zeros((rows, rows))]])
        )
        graph.remove_nodes_from(list(networkx.isolates(graph)))
        values = np.sort(np.abs(networkx.adjacency_spectrum(graph)))[::-1]
        oracle.append((graph, values))
    graph, values = oracle[0]
    degrees = [graph.number_of_edges() / sum(1 for v in graph if (v < cols) == side) for side in (True, False)]
    assert found.ramanujan_gap == pytest.approx(sum(math.sqrt(d - 1) for d in degrees) - values[2])
    assert found.weighted_gap == pytest.approx(oracle[1][1][0] - oracle[1][1][2])
    sparse = scipy.sparse.linalg.svds(scipy.sparse.csr_array(weights.numpy()), k=2, return_singular_vectors=False)
    assert found.weighted_gap == pytest.approx(abs(sparse[1] - sparse[0]))


def test_the_means_are_over_regular_subgraphs():
    """Degrees 4 (four columns), 3 (three) and 5 (two: too few): two subgraphs, each measured by itself."""
    mask = torch.zeros(9, 5)
    mask[:4, :4] = 1  # a complete 4 x 4
    mask[4:7, [0, 1, 2]] = 1  # a complete 3 x 3
    mask[7:, :] = 1
    found = measure(*edges(mask))
    by_hand = [2 * math.sqrt(3), 2 * math.sqrt(2)]  # of both the second singular value is 0
    assert found.mean_ramanujan_gap == pytest.approx(sum(by_hand) / 2)
    assert found.mean_weighted_gap == pytest.approx((4 + 3) / 2)


def test_what_is_not_defined_is_none():
    two = measure(*edges(torch.ones(2, 9)))  # block rows of degree 2
    assert two == MODULE.Spectral(None, None, None, None)
    assert measure(*edges(torch.zeros(3, 3))) == two
    diagonal = torch.ones(4, 8)
    diagonal[0, :2] = 0
    diagonal[1, :1] = 0
    partly = measure(*edges(diagonal))  # degrees 6, 7, 8, 8: no degree that three share
    assert partly.ramanujan_gap is not None and partly.mean_ramanujan_gap is None is partly.mean_weighted_gap


def test_large_graphs_need_no_dense_matrix(monkeypatch):
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(90, 120, generator=generator) < 0.2
    left, right, ones = edges(mask)
    for weights in (ones, torch.rand(len(left), generator=generator, dtype=torch.float64)):
        expected = two_largest(left, right, weights, (90, 120))
        with monkeypatch.context() as patch:
            patch.setattr(MODULE, "DENSE_CELLS", 0)
            state = torch.get_rng_state()
            assert two_largest(left, right, weights, (90, 120)) == pytest.approx(expected, rel=1e-7)
            assert torch.equal(state, torch.get_rng_state())


def test_a_layer_is_measured_by_its_blocks():
    """The size of the blocks does not matter, their norms do, and free slots are no edges."""
    mask = torch.ones(4, 5)
    mask[0, 0] = 0
    row, col = mask.nonzero().int().T
    for block in (1, 8):
        grid = sk.topology.Grid(4 * block, 5 * block, (block, block))
        layer = sk.SparseLinear(5 * block, 4 * block, topology=Topology(grid, row, col), capacity=22)
        with torch.no_grad():
            layer.values.fill_(2 / block)  # norm 2
        found = spectral(layer)
        values = torch.linalg.svdvals(mask.double())
        degrees = 19 / 4, 19 / 5
        assert found.ramanujan_gap == pytest.approx(sum(math.sqrt(d - 1) for d in degrees) - float(values[1]))
        assert found.weighted_gap == pytest.approx(2 * float(values[0] - values[1]), rel=1e-6)


def test_groups_do_not_share_inputs():
    """Two groups of 3 x 4 blocks, all stored: two complete graphs, not one of 6 x 4."""
    grid = conv_grid(8, 6, (1, 1), (1, 1), 2)
    row, col = torch.ones(6, 4).nonzero().int().T
    layer = sk.SparseConv2d(8, 6, 1, groups=2, topology=Topology(grid, row, col))
    assert spectral(layer).ramanujan_gap == pytest.approx(math.sqrt(3) + math.sqrt(2) - math.sqrt(12))
