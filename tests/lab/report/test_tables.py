import copy
import io

import pytest
from rich.console import Console

from sparsekern.cli.shell import table
from sparsekern.lab import Config
from sparsekern.lab.report.tables import (
    aligned,
    comparison_cells,
    comparison_notes,
    markdown,
    result_cells,
    result_notes,
    result_title,
)


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
        "at_equal_time": {"seconds": 61.7, "sparse": 0.9789, "dense": 0.95},
    },
}


def shown(results, width=100):
    console = Console(file=io.StringIO(), width=width)
    console.print(
        table(
            result_title(Config.from_json(results["config"]), results), result_cells(results), len(results["networks"])
        )
    )
    return console.file.getvalue()


def words(results):
    return " ".join(shown(results, width=200).split())


def test_a_slower_sparse_network_is_called_slower():
    text = shown(RESULTS)
    for cell in ("97.89 ± 0.21 %", "98.12 ± 0.16 %", "-0.23 ± 0.11 points", "288,522", "7.54x fewer", "4.4 MiB"):
        assert cell in text
    assert "8.00 ms" in text and "1.25x SLOWER" in text
    assert "digits, MLP of width 2048: hidden layers 87.5 % sparse" in words(RESULTS)


def test_the_notes():
    assert aligned(result_notes(RESULTS)).splitlines() == [
        "accuracy       after the last epoch, mean over 5 seeds ± standard deviation; gap ± standard error; "
        "on 359 test images",
        "time           forward, backward and optimizer on CPU, 2 threads, eager kernels",
        "at equal time  accuracy that each network had after 62 seconds of training",
        "ratio          time of a sparse step / of a dense step, epoch by epoch: median 1.25, quartiles 1.10 to 1.40; "
        "the two networks took turns",
    ]


@pytest.mark.parametrize(
    ("ratio", "low", "high", "said"),
    [
        (0.5, 0.4, 0.6, "2.00x faster"),
        (1.25, 1.1, 1.4, "1.25x SLOWER"),
        (1.07, 0.97, 1.14, "no clear difference"),
        (0.5, None, None, "2.00x faster, too few epochs to be sure"),
        (1.001, None, None, "the same, too few epochs to be sure"),
        (None, None, None, "not measured"),
    ],
)
def test_the_ratio_in_words(ratio, low, high, said):
    results = copy.deepcopy(RESULTS)
    results["comparison"]["time_sparse_over_dense"] = {"median": ratio, "low": low, "high": high, "highest": ratio}
    assert said in words(results)
    assert ("ratio" in dict(result_notes(results))) == (low is not None)


def test_what_was_reached_at_equal_time():
    assert "at equal time │ 97.89 % │ 95.00 % │ +2.89 points" in words(RESULTS)
    results = copy.deepcopy(RESULTS)
    results["comparison"]["at_equal_time"]["dense"] = None  # it had not finished its first epoch
    assert "at equal time │ 97.89 % │ not measured │ │" in words(results)


def test_bits_per_byte_have_no_unit_and_a_speed():
    results = copy.deepcopy(RESULTS)
    for bits, one in zip((1.5, 1.25), results["networks"].values(), strict=True):
        one["bits_per_byte"] = {"mean": bits, "standard_deviation": None, "by_seed": [bits]}
        one["tokens_per_second"] = 1234.5
        del one["test_accuracy"]
    results["comparison"] |= {"bits_per_byte_gap": 0.25, "bits_per_byte_gap_standard_error": None}
    results["data"] = {"name": "a text", "train_bytes": 90, "held_out_bytes": 12345}
    text = words(results)
    assert "test bits per byte │ 1.50 │ 1.25 │ +0.25 │" in text
    assert "tokens a second │ 1,234 │ 1,234 │ │" in text
    assert "on 12,345 held out bytes" in dict(result_notes(results))["bits per byte"]


def test_a_busy_machine_is_noted():
    results = copy.deepcopy(RESULTS)
    results["networks"]["dense"]["ms_per_step"]["highest"] = 70.0
    assert "some epoch took 10 times as long as usual" in dict(result_notes(results))["busy"]


def test_one_seed_without_the_twin():
    results = copy.deepcopy(RESULTS)
    del results["comparison"], results["networks"]["dense"]
    results["config"] |= {"dense": False, "seeds": 1}
    results["networks"]["sparse"] = network(0.9, None, 5, 5, None)
    text = shown(results)
    assert "90.00 %" in text and "not measured" in text and "against" not in text
    assert "one seed" in dict(result_notes(results))["accuracy"] and "ratio" not in dict(result_notes(results))


def test_the_network_and_its_sparsity_are_named():
    assert "87.5 % sparse in blocks of 16 (set), first and last layer dense" in words(RESULTS)
    assert "overall sparsity │ 86.8 % │ 0.0 % │" in words(RESULTS)
    for options, title in (
        ({"recipe": "resnet20", "width_multiplier": 2}, "digits, ResNet-20, 2 times as wide: hidden layers"),
        ({"preset": "gse"}, "all layers 87.5 % sparse in blocks of 16 (gse) ┏"),
        ({"preset": "rigl"}, "all layers but the first 87.5 % sparse in blocks of 16 (rigl) ┏"),
    ):
        assert title in words(RESULTS | {"config": Config(**options).to_json()})


def test_fits_a_narrow_terminal():
    text = shown(RESULTS, width=80)
    assert "median time a step" in text and "-0.23 ± 0.11 points" in text


def compared(method, sparsity=None, gap=None, **changes):
    return {
        "method": method,
        "sparsity": sparsity,
        "network_sparsity": 0.0 if sparsity is None else sparsity - 0.05,
        "block_size": None if sparsity is None else 16,
        "test_accuracy": {"mean": 0.9, "standard_deviation": 0.01},
        "gap_to_dense": None if gap is None else {"mean": gap, "standard_deviation": None},
        "seconds": {"mean": 12.34, "standard_deviation": 0.5},
        "ms_per_step": 3.0,
        "training_flops": 1_234_000_000_000,
        "peak_bytes": 3 * 2**20,
    } | changes


ROWS = [compared("dense"), compared("gse, scope global", 0.9, -0.1)]


def test_the_table_of_a_comparison():
    heading, (dense, sparse) = comparison_cells(ROWS)
    assert (
        " ".join(heading) == ("method sparsity overall block accuracy (%) to dense seconds ms/step FLOPs peak MiB")
        and len(heading) == 10
    )
    times = ["12.3 ± 0.5", "3.00", "1.23T", "3.0"]
    assert dense == ["dense", "", "", "", "90.00 ± 1.00", "", *times]
    assert sparse == ["gse, scope global", "90 %", "85.0 %", "16", "90.00 ± 1.00", "-10.00", *times]
    assert markdown((heading, [dense, sparse])).splitlines() == [
        f"| {' | '.join(heading)} |",
        f"| --- |{' ---: |' * 9}",
        f"| {' | '.join(dense)} |",
        f"| {' | '.join(sparse)} |",
    ]


@pytest.mark.parametrize(("flops", "text"), [(2e15, "2P"), (999e9, "999G"), (1.5e6, "1.5M")])
def test_large_numbers_are_short(flops, text):
    _, (row,) = comparison_cells([compared("set", 0.9, training_flops=flops, ms_per_step=None)])
    assert row[7:9] == ["", text]


def test_what_is_said_of_a_comparison():
    content = {"plan": {"base": Config(seeds=1).to_json()}, "rows": ROWS} | {
        key: RESULTS[key] for key in ("data", "environment")
    }
    notes = aligned(comparison_notes(content))
    assert "accuracy  after the last epoch, one seed; to dense: difference in points\n" in notes
    assert "seconds   all steps of a training, on CPU, 2 threads\n" in notes
