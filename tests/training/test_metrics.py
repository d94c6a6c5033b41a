"""What a method tells, by hand on a grid of 4 x 4."""

from __future__ import annotations

import torch

import sparsekern as sk
from sparsekern.topology import (
    Grid,
    Move,
    Topology,
    balanced,
    from_mask,
    generator_for,
    random,
    sample_absent,
    with_capacity,
)
from sparsekern.training.metrics import LEAST, Coverage, TopologyMetrics
from tests.kernels.calls import ints

MASK = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]])


def make() -> tuple[sk.SparseLinear, TopologyMetrics]:
    layer = sk.SparseLinear(8, 8, topology=from_mask(Grid(8, 8, (2, 2)), MASK), capacity=5)
    return layer, TopologyMetrics({"fc": layer}, seed=0)


def move(layer: sk.SparseLinear, metrics_: TopologyMetrics, move: Move) -> None:
    layer.move_(*move)
    metrics_.add("fc", move)


def test_by_hand():
    layer, metrics_ = make()
    assert metrics_.values() == {
        "sparsity/fc": 0.75,
        "churn/fc": 0.0,
        "itop/fc": 0.25,
        "kept/fc": 1.0,
        "sparsity/global": 0.75,
        "itop/global": 0.25,
    }
    move(layer, metrics_, Move(torch.tensor([0, 2]), ints(3, 3), ints(0, 1)))  # two of four, to places never in use
    metrics = metrics_.values()
    assert (metrics["churn/fc"], metrics["itop/fc"], metrics["kept/fc"]) == (0.5, 6 / 16, 0.5)
    metrics_.begin_update()
    move(layer, metrics_, Move(torch.tensor([0, 1]), ints(0, -1), ints(0, -1)))  # one comes back, one is freed
    metrics = metrics_.values()
    assert (metrics["churn/fc"], metrics["itop/fc"], metrics["kept/fc"]) == (2 / 3, 6 / 16, 0.5)
    assert metrics["sparsity/fc"] == 13 / 16
    metrics_.begin_update()
    assert metrics_.churn == {"fc": 0.0}


def test_another_goes_on_where_the_state_was_taken():
    layer, metrics_ = make()
    move(layer, metrics_, Move(torch.tensor([3]), ints(3), ints(3)))
    other = TopologyMetrics({"fc": layer}, seed=0)
    other.load_state_dict(metrics_.state_dict())
    assert other.values() == metrics_.values() and other.values()["kept/fc"] == 0.75


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
