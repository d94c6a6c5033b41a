from __future__ import annotations

import pytest

from sparsekern.lab.config import Config
from sparsekern.lab.scores import score_rows


def result(accuracies, seconds, **config):
    config = Config(seeds=len(accuracies), **config)
    network = {
        "test_accuracy": {"by_seed": accuracies},
        "seconds": {"by_seed": seconds},
        "ms_per_step": {"median": 2.5},
        "network_sparsity": 0.625,
        "stored_parameters": 7,
        "training_bytes": 70,
    }
    return {"config": config.to_json(), "networks": {config.networks[0]: network}}


RESULTS = {
    "dense": result([0.9, 0.8], [10.0, 20.0], sparse=False),
    "gse-s0.9-b16": result([0.85, 0.81], [1.0, 3.0], method="gse", dense=False, options={"distribution": "grabo"}),
}
COSTS = {"dense": {"training_flops": 100, "peak_bytes": 50}, "gse-s0.9-b16": {"training_flops": 10, "peak_bytes": 5}}


def test_by_hand():
    dense, gse = score_rows(RESULTS, COSTS)
    assert (dense["method"], dense["sparsity"], dense["block_size"], dense["gap_to_dense"]) == (
        "dense",
        None,
        None,
        None,
    )
    assert (gse["name"], gse["method"]) == ("gse-s0.9-b16", "gse, distribution grabo")
    assert (gse["sparsity"], gse["block_size"], gse["ms_per_step"], gse["training_flops"]) == (0.9, 16, 2.5, 10)
    assert gse["network_sparsity"] == 0.625
    assert gse["test_accuracy"]["mean"] == pytest.approx(0.83) and gse["test_accuracy"]["by_seed"] == [0.85, 0.81]
    assert gse["test_accuracy"]["standard_deviation"] == pytest.approx(0.04 / 2**0.5)
    assert gse["gap_to_dense"]["mean"] == pytest.approx(-0.02)
    assert gse["gap_to_dense"]["standard_error"] == pytest.approx(0.03)  # of -0.05 and +0.01
    assert (gse["seconds"]["mean"], gse["peak_bytes"], dense["peak_bytes"]) == (2.0, 5, 50)


def test_without_the_twin_and_with_one_seed():
    (row,) = score_rows({"x": result([0.5], [1.0], dense=False)}, {"x": {"training_flops": 1, "peak_bytes": 1}})
    assert row["gap_to_dense"] is None and row["test_accuracy"]["standard_deviation"] is None
