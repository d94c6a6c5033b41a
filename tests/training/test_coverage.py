"""The rate of places that were ever in use: exact in small grids, estimated in large ones."""

from __future__ import annotations

import torch

from sparsekern.topology import Grid, Topology, balanced, generator_for, random, sample_absent, with_capacity
from sparsekern.training.coverage import LEAST, Coverage


def ints(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def test_a_small_grid_is_counted_exactly():
    coverage = Coverage(Topology(Grid(8, 8, (2, 2)), ints(0, 3, -1), ints(1, 0, -1)), 0, "")
    assert coverage.rate() == 2 / 16
    coverage.add(torch.tensor([5, 12, 5]))  # 12 was there from the start
    assert coverage.rate() == 3 / 16
    coverage.add(torch.empty(0, dtype=torch.int64))
    assert coverage.rate() == 3 / 16


def test_a_large_grid_is_estimated_from_a_sample():
    grid = Grid(2048, 2048, (1, 1))
    topology = with_capacity(random(grid, 40_000, generator_for(0)), 40_001)
    coverage = Coverage(topology, 0, "")
    assert coverage.seen.shape == (10_000,) and coverage.places.dtype == torch.int32
    used = topology.sorted_keys()
    for step in range(10):
        more = sample_absent(used, grid.cells, 100_000, generator_for(step))
        coverage.add(more)
        used = torch.cat([used, more.int()]).sort().values
    exact = used.shape[0] / grid.cells
    assert abs(coverage.rate() - exact) < 5 * (exact * (1 - exact) / 10_000) ** 0.5


def test_the_sample_is_that_of_the_seed_and_the_name():
    topology = balanced(Grid(256, 256, (1, 1)), 5000, generator_for(0))
    first, again, other = (Coverage(topology, 0, name) for name in ("a", "a", "b"))
    assert first.seen.shape == (LEAST,) and torch.equal(first.places, again.places)
    assert not torch.equal(first.places, other.places)
