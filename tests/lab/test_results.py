from __future__ import annotations

import pytest

from sparsekern.lab.config import Config
from sparsekern.lab.results import _spread, best_step, score_rows, summarise
from sparsekern.lab.tasks import ACCURACY, Metric

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
    result = summarise(ROWS, SIZES, ACCURACY)
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
    # each network took 3 seconds, so that both had finished
    assert compared["at_equal_time"] == {"seconds": 3.0, "sparse": sparse["test_accuracy"]["mean"], "dense": 0.9}
    # of 1/3, 1 and 1/2
    assert compared["time_sparse_over_dense"] == {"median": 0.5, "low": None, "high": None, "highest": 1.0}


def test_at_equal_time_by_hand():
    rows = [row("sparse", 0, epoch, epoch / 10, 1.0) | {"seconds": 1.0} for epoch in (1, 2, 3)]
    rows += [row("dense", 0, epoch, epoch / 20, 2.0) | {"seconds": 2.0} for epoch in (1, 2, 3)]
    # after the 3 seconds of the sparse network the dense one had finished one epoch of 2 seconds
    compared = summarise(rows, SIZES, ACCURACY)["comparison"]
    assert compared["at_equal_time"] == {"seconds": 3.0, "sparse": 0.3, "dense": 0.05}
    slow = [r | {"seconds": 5.0} if r["network"] == "dense" else r for r in rows]
    assert summarise(slow, SIZES, ACCURACY)["comparison"]["at_equal_time"]["dense"] is None


def test_tokens_a_second():
    assert "tokens_per_second" not in summarise(ROWS, SIZES, ACCURACY)["networks"]["sparse"]
    networks = summarise(ROWS, SIZES, ACCURACY, tokens=2048)["networks"]
    assert networks["sparse"]["tokens_per_second"] == 2048 / 0.004


def test_one_seed_has_no_deviation():
    result = summarise([r for r in ROWS if r["seed"] == 0], SIZES, ACCURACY)
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
    assert summarise(rows, {"sparse": SIZES["sparse"]}, ACCURACY)["networks"]["sparse"]["sparsity"] == 0.875


def test_nothing_timed():
    rows = [row("sparse", 0, 1, 0.5, None), row("dense", 0, 1, 0.5, None)]
    assert summarise(rows, SIZES, ACCURACY)["comparison"]["time_sparse_over_dense"]["median"] is None


def test_without_the_twin():
    result = summarise([r for r in ROWS if r["network"] == "sparse"], {"sparse": SIZES["sparse"]}, ACCURACY)
    assert "comparison" not in result and list(result["networks"]) == ["sparse"]


def scored(network, epoch, accuracy):
    return {"network": network, "epoch": epoch, "step": 10 * epoch, "test_accuracy": accuracy}


def test_the_best_epoch_is_the_first_networks():
    rows = [scored("sparse", 1, 0.5), scored("dense", 1, 0.9), scored("sparse", 2, 0.7), scored("dense", 2, 0.6)]
    rows += [scored("sparse", 3, 0.7), scored("dense", 3, 1.0)]
    both = ["sparse", "dense"]
    assert best_step(rows, both, ACCURACY) == 40, "of equal ones the first"
    assert best_step([*rows, scored("sparse", 4, 0.9)], both, ACCURACY) == 40, "the dense one is not done with it"
    assert best_step(rows[:1], ["sparse"], ACCURACY) == 10
    assert best_step(rows[:1], both, ACCURACY) is None and best_step([], ["sparse"], ACCURACY) is None


def test_another_metric_of_which_less_is_better():
    bits = Metric("bits_per_byte", "bits_gap", "bits per byte", "bits", 1, "bits", False, "test_bytes")
    rows = [{**row, "bits_per_byte": 3 * row["test_accuracy"]} for row in ROWS]
    result = summarise(rows, SIZES, bits)
    assert result["networks"]["dense"]["bits_per_byte"]["by_seed"] == pytest.approx([2.7, 2.7])
    assert result["comparison"]["bits_gap"] == pytest.approx(-0.15)
    steps = [{**scored("sparse", n, 0), "bits_per_byte": number} for n, number in ((1, 2.0), (2, 1.5), (3, 1.7))]
    assert best_step(steps, ["sparse"], bits) == 20


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
    return config, {"networks": {config.networks[0]: network}}


CELLS = {
    "dense": result([0.9, 0.8], [10.0, 20.0], sparse=False),
    "gse-s0.9-b16": result([0.85, 0.81], [1.0, 3.0], method="gse", dense=False, options={"distribution": "grabo"}),
}
COSTS = {"dense": {"training_flops": 100, "peak_bytes": 50}, "gse-s0.9-b16": {"training_flops": 10, "peak_bytes": 5}}


def rows_of(cells, costs):
    configs, results = ({name: cell[part] for name, cell in cells.items()} for part in (0, 1))
    return score_rows(configs, {name: result | {"cost": costs[name]} for name, result in results.items()})


def test_rows_by_hand():
    dense, gse = rows_of(CELLS, COSTS)
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
    (row,) = rows_of({"x": result([0.5], [1.0], dense=False)}, {"x": {"training_flops": 1, "peak_bytes": 1}})
    assert row["gap_to_dense"] is None and row["test_accuracy"]["standard_deviation"] is None
