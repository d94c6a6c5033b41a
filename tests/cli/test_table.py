import copy
import io

import pytest
from rich.console import Console

from sparsekern.cli.table import notes, result_table
from sparsekern.recipes import Config


def network(mean, deviation, parameters, size, ms):
    return {
        "test_accuracy": {"mean": mean, "standard_deviation": deviation, "by_seed": []},
        "stored_parameters": parameters,
        "training_bytes": size,
        "ms_per_step": {"median": ms, "low": None, "high": None},
    }


RESULTS = {
    "config": Config(epochs=2).to_json(),
    "data": {"name": "digits"},
    "environment": {"device": "CPU", "threads": 2, "kernels": "eager"},
    "networks": {
        "sparse": network(0.9789, 0.0021, 288522, 4.4 * 2**20, 8.0),
        "dense": network(0.9812, 0.0016, 2176010, 33.2 * 2**20, 7.0),
    },
    "comparison": {
        "accuracy_gap": -0.0023,
        "accuracy_gap_standard_error": 0.0011,
        "parameters_dense_over_sparse": 7.54,
        "bytes_dense_over_sparse": 7.5,
        "time_dense_over_sparse": {"median": 0.8, "low": 0.7, "high": 0.9},
    },
}


def shown(results, width=100):
    console = Console(file=io.StringIO(), width=width)
    console.print(result_table(results))
    return console.file.getvalue()


def test_a_slower_sparse_network_is_called_slower():
    text = shown(RESULTS)
    for cell in ("97.89 ± 0.21 %", "98.12 ± 0.16 %", "-0.23 ± 0.11 points", "288,522", "7.54x fewer", "4.4 MiB"):
        assert cell in text
    assert "8.00 ms" in text and "1.25x SLOWER" in text
    assert "dense / sparse 0.80, quartiles 0.70 to 0.90" in notes(RESULTS)
    assert "mean over 5 seeds" in notes(RESULTS) and "eager kernels" in notes(RESULTS)


@pytest.mark.parametrize(("ratio", "words"), [(2.0, "2.00x faster"), (1.001, "the same"), (None, "not measured")])
def test_the_ratio_in_words(ratio, words):
    results = copy.deepcopy(RESULTS)
    results["comparison"]["time_dense_over_sparse"] = {"median": ratio, "low": None, "high": None}
    assert words in shown(results)
    assert "quartiles" not in notes(results)


def test_one_seed_without_the_twin():
    results = copy.deepcopy(RESULTS)
    del results["comparison"], results["networks"]["dense"]
    results["config"] |= {"dense": False, "seeds": 1}
    results["networks"]["sparse"] = network(0.9, None, 5, 5, None)
    text = shown(results)
    assert "90.00 %" in text and "not measured" in text and "against" not in text
    assert "one seed" in notes(results) and "ratio" not in notes(results)


def test_fits_a_narrow_terminal():
    text = shown(RESULTS, width=80)
    assert "median time a step" in text and "-0.23 ± 0.11 points" in text
