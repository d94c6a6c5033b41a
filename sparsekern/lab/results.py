"""The numbers at the end of a run, from its rows. No drawing, no rounding."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from sparsekern.lab.config import Config

Row = dict[str, Any]


def summarise(rows: Sequence[Row], sizes: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Return accuracy, sizes and times of the networks, and their comparison if the dense twin was trained.

    Accuracies are fractions, those of the last epoch (never the best one: that would choose by the test set).

    Args:
        rows: of ``metrics.jsonl``: all seeds, all epochs.
        sizes: ``network_sparsity``, ``stored_parameters`` and ``training_bytes`` by network.
    """
    result: dict[str, Any] = {"networks": {name: _network(rows, name, sizes[name]) for name in sizes}}
    if sizes.keys() == {"sparse", "dense"}:
        sparse, dense = (result["networks"][name] for name in ("sparse", "dense"))
        gaps = [
            s - d for s, d in zip(sparse["test_accuracy"]["by_seed"], dense["test_accuracy"]["by_seed"], strict=True)
        ]
        result["comparison"] = {
            "accuracy_gap": statistics.fmean(gaps),
            "accuracy_gap_standard_error": statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else None,
            "parameters_dense_over_sparse": dense["stored_parameters"] / sparse["stored_parameters"],
            "bytes_dense_over_sparse": dense["training_bytes"] / sparse["training_bytes"],
            "time_sparse_over_dense": _spread(_time_ratios(rows)),
        }
    return result


def _network(rows: Sequence[Row], name: str, sizes: dict[str, float]) -> dict[str, Any]:
    mine = [row for row in rows if row["network"] == name]
    last = max(row["epoch"] for row in mine)
    final = [row["test_accuracy"] for row in mine if row["epoch"] == last]
    return {
        "sparsity": mine[-1].get("sparsity/global", 0.0),
        "test_accuracy": {
            "mean": statistics.fmean(final),
            "standard_deviation": statistics.stdev(final) if len(final) > 1 else None,
            "by_seed": final,
        },
        **sizes,
        "seconds": _seconds(mine),
        "ms_per_step": _spread([row["ms_per_step"] for row in mine if row["ms_per_step"] is not None]),
    }


def _seconds(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the time of all steps of a training: the mean over seeds, and each; None of rows of an older format."""
    if any("seconds" not in row for row in rows):
        return {"mean": None, "by_seed": None}
    by_seed: dict[int, float] = {}
    for row in rows:
        by_seed[row["seed"]] = by_seed.get(row["seed"], 0.0) + row["seconds"]
    return {"mean": statistics.fmean(by_seed.values()), "by_seed": list(by_seed.values())}


def _time_ratios(rows: Sequence[Row]) -> list[float]:
    """Return sparse time over dense time, epoch by epoch: the two ran side by side, so a slow spell slows both."""
    times = {(row["network"], row["seed"], row["epoch"]): row["ms_per_step"] for row in rows}
    pairs = [(time, times["sparse", seed, epoch]) for (name, seed, epoch), time in times.items() if name == "dense"]
    return [sparse / dense for dense, sparse in pairs if dense is not None and sparse is not None]


def _spread(values: list[float]) -> dict[str, float | None]:
    """Return the median, the quartiles and the highest value; None where there are too few values."""
    highest = max(values, default=None)
    if len(values) < 4:
        median = statistics.median(values) if values else None
        return {"median": median, "low": None, "high": None, "highest": highest}
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high, "highest": highest}


def score_rows(results: Mapping[str, dict[str, Any]], costs: Mapping[str, dict[str, int]]) -> list[dict[str, Any]]:
    """Return a row for each run, in their order.

    Gaps to the dense twin are taken seed by seed: both saw the same batches.

    Args:
        results: ``results.json`` of each run, by the name of its folder. Each has one network.
        costs: what :func:`sparsekern.lab.cost.training_cost` returned for it.
    """
    twin = next((r["networks"]["dense"] for r in results.values() if "dense" in r["networks"]), None)
    return [_row(name, result, costs[name], twin) for name, result in results.items()]


def _row(name: str, result: dict[str, Any], cost: dict[str, int], twin: dict[str, Any] | None) -> dict[str, Any]:
    config = Config.from_json(result["config"])
    network = result["networks"][config.networks[0]]
    accuracies = network["test_accuracy"]["by_seed"]
    dense = not config.sparse
    gaps = None
    if twin is not None and not dense:
        gaps = _mean([s - d for s, d in zip(accuracies, twin["test_accuracy"]["by_seed"], strict=True)])
    return {
        "name": name,
        "method": "dense" if dense else config.method_title,
        "sparsity": None if dense else config.sparsity,
        "network_sparsity": network.get("network_sparsity"),  # older runs have none
        "block_size": None if dense else config.block_size,
        "test_accuracy": _mean(accuracies),
        "gap_to_dense": gaps,
        "seconds": _mean(network["seconds"]["by_seed"]),
        "ms_per_step": network["ms_per_step"]["median"],
        "stored_parameters": network["stored_parameters"],
        "training_bytes": network["training_bytes"],
        **cost,
    }


def _mean(values: Sequence[float]) -> dict[str, Any]:
    several = len(values) > 1
    deviation = statistics.stdev(values) if several else None
    return {
        "mean": statistics.fmean(values),
        "standard_deviation": deviation,
        "standard_error": deviation / math.sqrt(len(values)) if deviation is not None else None,
        "by_seed": list(values),
    }
