"""The rows of a comparison, from the results of its runs. No drawing, no rounding."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from sparsekern.lab.config import Config


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
