import copy
import io

import pytest
from rich.console import Console

from sparsekern.cli.table import notes, result_table
from sparsekern.lab import Config


def network(mean, deviation, parameters, size, ms, absent=0.0):
    return {
        "network_sparsity": absent,
        "test_accuracy": {"mean": mean, "standard_deviation": deviation, "by_seed": []},
        "stored_parameters": parameters,
        "training_bytes": size,
        "sparsity": 0.875,
        "ms_per_step": {"median": ms, "low": None, "high": None, "highest": ms},
    }


RESULTS = {
    "config": Config(epochs=2).to_json(),
    "data": {"name": "digits", "test_images": 359},
    "environment": {"device": "CPU", "threads": 2, "kernels": "eager"},
    "networks": {
        "sparse": network(0.9789, 0.0021, 288522, 4.4 * 2**20, 8.0, 0.8682),
        "dense": network(0.9812, 0.0016, 2176010, 33.2 * 2**20, 7.0),
    },
    "comparison": {
        "accuracy_gap": -0.0023,
        "accuracy_gap_standard_error": 0.0011,
        "parameters_dense_over_sparse": 7.54,
        "bytes_dense_over_sparse": 7.5,
        "time_sparse_over_dense": {"median": 1.25, "low": 1.1, "high": 1.4, "highest": 2.0},
    },
}


def shown(results, width=100):
    console = Console(file=io.StringIO(), width=width)
    console.print(result_table(results))
    return console.file.getvalue()


def test_one_thread_is_not_threads():
    assert "on CPU, 2 threads, eager" in notes(RESULTS)
    assert "on CPU, 1 thread, eager" in notes(RESULTS | {"environment": RESULTS["environment"] | {"threads": 1}})


def test_a_slower_sparse_network_is_called_slower():
    text = shown(RESULTS)
    for cell in ("97.89 ± 0.21 %", "98.12 ± 0.16 %", "-0.23 ± 0.11 points", "288,522", "7.54x fewer", "4.4 MiB"):
        assert cell in text
    assert "8.00 ms" in text and "1.25x SLOWER" in text
    assert "epoch by epoch: median 1.25, quartiles 1.10 to 1.40" in notes(RESULTS)
    assert "hidden layers 87.5 % sparse" in " ".join(text.split()) and "359 test images" in notes(RESULTS)
    assert "busy" not in notes(RESULTS)
    assert "mean over 5 seeds" in notes(RESULTS) and "eager kernels" in notes(RESULTS)


@pytest.mark.parametrize(
    ("ratio", "low", "high", "words"),
    [
        (0.5, 0.4, 0.6, "2.00x faster"),
        (1.25, 1.1, 1.4, "1.25x SLOWER"),
        (1.07, 0.97, 1.14, "no clear difference"),
        (0.5, None, None, "2.00x faster, too few epochs to be sure"),
        (1.001, None, None, "the same, too few epochs to be sure"),
        (None, None, None, "not measured"),
    ],
)
def test_the_ratio_in_words(ratio, low, high, words):
    results = copy.deepcopy(RESULTS)
    results["comparison"]["time_sparse_over_dense"] = {"median": ratio, "low": low, "high": high, "highest": ratio}
    assert words in " ".join(shown(results, width=200).split())
    assert ("quartiles" in notes(results)) == (low is not None)


def test_a_busy_machine_is_noted():
    results = copy.deepcopy(RESULTS)
    results["networks"]["dense"]["ms_per_step"]["highest"] = 70.0
    assert "some epoch took 10 times as long as usual" in notes(results)


def test_one_seed_without_the_twin():
    results = copy.deepcopy(RESULTS)
    del results["comparison"], results["networks"]["dense"]
    results["config"] |= {"dense": False, "seeds": 1}
    results["networks"]["sparse"] = network(0.9, None, 5, 5, None)
    text = shown(results)
    assert "90.00 %" in text and "not measured" in text and "against" not in text
    assert "one seed" in notes(results) and "ratio" not in notes(results)


def test_the_network_is_named():
    results = copy.deepcopy(RESULTS)
    assert "digits, MLP of width 2048: hidden layers 87.5 % sparse" in " ".join(shown(results, width=200).split())
    results["config"] = Config(recipe="resnet20", width_multiplier=2).to_json()
    assert "digits, ResNet-20, 2 times as wide: hidden layers" in " ".join(shown(results, width=200).split())


def test_the_sparsity_of_the_whole_network_stands_beside_the_nominal_one():
    words = " ".join(shown(RESULTS, width=200).split())
    assert "87.5 % sparse in blocks of 16 (set), first and last layer dense" in words
    assert "overall sparsity │ 86.8 % │ 0.0 % │" in words
    results = copy.deepcopy(RESULTS)
    results["config"] = Config(preset="gse").to_json()
    assert "all layers 87.5 % sparse in blocks of 16 (gse) ┏" in " ".join(shown(results, width=200).split())
    results["config"] = Config(preset="rigl").to_json()
    assert "all layers but the first 87.5 % sparse in blocks of 16 (rigl) ┏" in " ".join(
        shown(results, width=200).split()
    )
    del results["networks"]["sparse"]["network_sparsity"]
    assert "overall sparsity │ not recorded │ 0.0 % │" in " ".join(shown(results, width=200).split())


def test_fits_a_narrow_terminal():
    text = shown(RESULTS, width=80)
    assert "median time a step" in text and "-0.23 ± 0.11 points" in text
