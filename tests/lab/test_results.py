from __future__ import annotations

import pytest

from sparsekern.lab.config import Config
from sparsekern.lab.results import _spread, score_rows, summarise

SIZES = {
    "sparse": {"stored_parameters": 10, "training_bytes": 100},
    "dense": {"stored_parameters": 40, "training_bytes": 250},
}


def row(network, seed, epoch, accuracy, ms):
    return {"network": network, "seed": seed, "epoch": epoch, "test_accuracy": accuracy, "ms_per_step": ms} | {
        "seconds": float(epoch)
    }


ROWS = [
    row("sparse", 0, 1, 1.0, None),
    row("dense", 0, 1, 1.0, 4.0),
    row("sparse", 0, 2, 0.8, 2.0),
    row("dense", 0, 2, 0.9, 6.0),
    row("sparse", 1, 1, 1.0, 10.0),
    row("dense", 1, 1, 1.0, 10.0),
    row("sparse", 1, 2, 0.9, 4.0),
    row("dense", 1, 2, 0.9, 8.0),
]


def test_by_hand():
    result = summarise(ROWS, SIZES)
    sparse, dense = result["networks"]["sparse"], result["networks"]["dense"]
    assert sparse["test_accuracy"]["by_seed"] == [0.8, 0.9]  # the last epoch, not the best
    assert sparse["test_accuracy"]["mean"] == pytest.approx(0.85)
    assert sparse["test_accuracy"]["standard_deviation"] == pytest.approx(0.1 / 2**0.5)
    assert (sparse["stored_parameters"], dense["training_bytes"]) == (10, 250)
    assert sparse["ms_per_step"] == {"median": 4.0, "low": None, "high": None, "highest": 10.0}
    assert sparse["seconds"] == {"mean": 3.0, "by_seed": [3.0, 3.0]}
    compared = result["comparison"]
    assert compared["accuracy_gap"] == pytest.approx(-0.05)
    assert compared["accuracy_gap_standard_error"] == pytest.approx(0.05)
    assert compared["parameters_dense_over_sparse"] == 4 and compared["bytes_dense_over_sparse"] == 2.5
    # of 1/3, 1 and 1/2
    assert compared["time_sparse_over_dense"] == {"median": 0.5, "low": None, "high": None, "highest": 1.0}


def test_one_seed_has_no_deviation():
    result = summarise([r for r in ROWS if r["seed"] == 0], SIZES)
    assert result["networks"]["sparse"]["test_accuracy"]["standard_deviation"] is None
    assert result["comparison"]["accuracy_gap_standard_error"] is None
    third = 1 / 3
    assert result["comparison"]["time_sparse_over_dense"] == {
        "median": third,
        "low": None,
        "high": None,
        "highest": third,
    }


def test_quartiles_need_four_values():
    assert _spread([4.0, 1.0, 2.0, 3.0, 5.0]) == {"median": 3, "low": 2, "high": 4, "highest": 5}
    assert _spread([3.0, 1.0, 2.0]) == {"median": 2, "low": None, "high": None, "highest": 3}


def test_the_sparsity_is_the_one_reached():
    rows = [ROWS[0] | {"sparsity/global": 0.875}]
    assert summarise(rows, {"sparse": SIZES["sparse"]})["networks"]["sparse"]["sparsity"] == 0.875


def test_nothing_timed():
    rows = [row("sparse", 0, 1, 0.5, None), row("dense", 0, 1, 0.5, None)]
    assert summarise(rows, SIZES)["comparison"]["time_sparse_over_dense"]["median"] is None


def test_without_the_twin():
    result = summarise([r for r in ROWS if r["network"] == "sparse"], {"sparse": SIZES["sparse"]})
    assert "comparison" not in result and list(result["networks"]) == ["sparse"]


def test_rows_of_an_older_format_say_no_seconds():
    row = {"network": "sparse", "seed": 0, "epoch": 1, "test_accuracy": 0.5, "ms_per_step": 2.0}
    found = summarise([row], {"sparse": {"stored_parameters": 1, "training_bytes": 4}})
    assert found["networks"]["sparse"]["seconds"] == {"mean": None, "by_seed": None}


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


def test_rows_by_hand():
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
