"""Results of runs and of comparisons, from the rows of their metrics. Nothing is drawn or rounded."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from sparsekern.lab.config import Config
from sparsekern.lab.recipes import find
from sparsekern.lab.tasks import Metric

Row = Mapping[str, Any]


def summarise(
    rows: Sequence[Row], sizes: Mapping[str, Mapping[str, float]], metric: Metric, tokens: int | None = None
) -> dict[str, Any]:
    """Return metric, sizes and times of the networks, and their comparison if the dense twin was trained.

    The metric is that of the last epoch, never of the best one: that would choose by the test set.

    Args:
        rows: of ``metrics.jsonl``: all seeds, all epochs.
        sizes: ``network_sparsity``, ``stored_parameters`` and ``training_bytes`` by network.
        metric: of the task.
        tokens: of a step, for tasks that have tokens.
    """
    result: dict[str, Any] = {"networks": {name: _network(rows, name, sizes[name], metric, tokens) for name in sizes}}
    if sizes.keys() == {"sparse", "dense"}:
        sparse, dense = (result["networks"][name] for name in ("sparse", "dense"))
        gaps = _differences(sparse[metric.key]["by_seed"], dense[metric.key]["by_seed"])
        result["comparison"] = {
            metric.gap: statistics.fmean(gaps),
            f"{metric.gap}_standard_error": statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else None,
            "parameters_dense_over_sparse": dense["stored_parameters"] / sparse["stored_parameters"],
            "bytes_dense_over_sparse": dense["training_bytes"] / sparse["training_bytes"],
            "time_sparse_over_dense": _spread(_time_ratios(rows)),
            "at_equal_time": _at_equal_time(rows, metric),
        }
    return result


def _at_equal_time(rows: Sequence[Row], metric: Metric) -> dict[str, Any]:
    """Return what both networks had reached when the faster one was done, as means over the seeds.

    That is what the last evaluation before said; None if there was none.
    """
    reached: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for row in sorted(rows, key=lambda row: row["epoch"]):
        so_far = reached.setdefault((row["network"], row["seed"]), [(0.0, math.nan)])
        so_far.append((so_far[-1][0] + row["seconds"], row[metric.key]))
    seeds = sorted({seed for _, seed in reached})
    ends = [min(reached["sparse", seed][-1][0], reached["dense", seed][-1][0]) for seed in seeds]
    found: dict[str, Any] = {"seconds": statistics.fmean(ends)}
    for network in ("sparse", "dense"):
        values = [
            [value for at, value in reached[network, seed] if at <= end][-1]
            for seed, end in zip(seeds, ends, strict=True)
        ]
        mean = statistics.fmean(values)
        found[network] = None if math.isnan(mean) else mean
    return found


def _network(
    rows: Sequence[Row], name: str, sizes: Mapping[str, float], metric: Metric, tokens: int | None
) -> dict[str, Any]:
    mine = [row for row in rows if row["network"] == name]
    last = max(row["epoch"] for row in mine)
    final = [row[metric.key] for row in mine if row["epoch"] == last]
    seconds: dict[int, float] = {}
    for row in mine:
        seconds[row["seed"]] = seconds.get(row["seed"], 0.0) + row["seconds"]
    of_round = [row for row in mine if row.get("round") == mine[-1].get("round")]  # the last
    times = _spread([row["ms_per_step"] for row in of_round if row["ms_per_step"] is not None])
    speed = {}
    if tokens is not None and times["median"]:
        speed["tokens_per_second"] = 1e3 * tokens / times["median"]
    return {
        "sparsity": mine[-1].get("sparsity/global", 0.0),
        metric.key: {
            "mean": statistics.fmean(final),
            "standard_deviation": statistics.stdev(final) if len(final) > 1 else None,
            "by_seed": final,
        },
        **sizes,
        "seconds": {"mean": statistics.fmean(seconds.values()), "by_seed": list(seconds.values())},
        "ms_per_step": times,
        **speed,
    }


def _differences(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """Return the differences seed by seed: both networks saw the same batches."""
    return [a - b for a, b in zip(first, second, strict=True)]


def _time_ratios(rows: Sequence[Row]) -> list[float]:
    """Return sparse time over dense time, epoch by epoch: the two ran side by side, so a slow spell slows both.

    Of several rounds the last one counts, whose epochs end with the last.
    """
    end = {name: max(row["epoch"] for row in rows if row["network"] == name) for name in ("sparse", "dense")}
    times = {(row["network"], row["seed"], row["epoch"] - end[row["network"]]): row["ms_per_step"] for row in rows}
    pairs = [
        (time, times.get(("sparse", seed, epoch))) for (name, seed, epoch), time in times.items() if name == "dense"
    ]
    return [sparse / dense for dense, sparse in pairs if dense is not None and sparse is not None]


def _spread(values: list[float]) -> dict[str, float | None]:
    """Return the median, the quartiles and the highest value; None where there are too few values."""
    highest = max(values, default=None)
    if len(values) < 4:
        median = statistics.median(values) if values else None
        return {"median": median, "low": None, "high": None, "highest": highest}
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high, "highest": highest}


def best_step(rows: Sequence[Row], networks: Sequence[str], metric: Metric) -> int | None:
    """Return the number of the checkpoint after the first network's best epoch, or None if none is complete.

    Args:
        rows: of one seed.
        networks: in the order in which they are trained; a checkpoint is numbered by the steps of all together.
        metric: of the task.
    """
    by_epoch: dict[int, dict[str, Row]] = {}
    last = max((row.get("round", 0) for row in rows), default=0)
    for row in rows if not last else [row for row in rows if row.get("round", 0) == last]:
        by_epoch.setdefault(row["epoch"], {})[row["network"]] = row
    complete = [one for one in by_epoch.values() if all(name in one for name in networks)]
    if not complete:
        return None
    better = max if metric.higher_is_better else min
    best = better(complete, key=lambda one: one[networks[0]][metric.key])  # of equal ones the first
    return sum(int(best[name]["step"]) for name in networks)


def score_rows(cells: Mapping[str, Config], results: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of a comparison, one for each run that is finished, in their order.

    Args:
        cells: configuration of each run, by the name of its folder.
        results: ``results.json`` of each finished run, of one network, with its ``"cost"``, which
            :func:`sparsekern.lab.cost.training_cost` returned.
    """
    twin = next((r["networks"]["dense"] for r in results.values() if "dense" in r["networks"]), None)
    return [_row(name, cells[name], result, twin) for name, result in results.items()]


def _row(name: str, config: Config, result: dict[str, Any], twin: dict[str, Any] | None) -> dict[str, Any]:
    metric = find(config.recipe).task.metric
    network = result["networks"][config.networks[0]]
    by_seed = network[metric.key]["by_seed"]
    dense = not config.sparse
    return {
        "name": name,
        "method": "dense" if dense else config.method_title,
        "sparsity": None if dense else config.sparsity,
        "network_sparsity": network["network_sparsity"],
        "block_size": None if dense else config.block_size,
        metric.key: _mean(by_seed),
        "gap_to_dense": None if twin is None or dense else _mean(_differences(by_seed, twin[metric.key]["by_seed"])),
        "seconds": _mean(network["seconds"]["by_seed"]),
        "ms_per_step": network["ms_per_step"]["median"],
        "stored_parameters": network["stored_parameters"],
        "training_bytes": network["training_bytes"],
        **result["cost"],
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
