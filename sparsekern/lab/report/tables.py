"""The tables of a run and of a comparison, as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sparsekern.lab.config import Config
from sparsekern.lab.metric import Metric, metric_of
from sparsekern.lab.report.text import count, mean_and_deviation, percent

MIB = 2**20

DENSE = ("", "", ", first and last layer dense")
"""Which layers stay dense, by their number; of a single one, the words for the sparse layers say it."""

BUSY = 3
"""An epoch this many times slower than the median one is worth a note."""

Cells = tuple[list[str], list[list[str]]]
"""A heading and rows of cells."""


def result_title(config: Config, results: dict[str, Any]) -> str:
    """Return the title of the table of a run's ``results.json``."""
    networks = results["networks"]
    sparse = "dense"
    if "sparse" in networks:
        sparse = (
            f"{config.sparse_title} {100 * networks['sparse']['sparsity']:.1f} % sparse in blocks of "
            f"{config.block_size} ({config.method_title}){DENSE[len(config.kept_dense)]}"
        )
    return f"{results['data']['name']}, {config.network_title}: {sparse}"


def result_cells(results: dict[str, Any]) -> Cells:
    """Return the table of ``results.json``: a row a quantity, a column a network, and one for their comparison."""
    networks, comparison = results["networks"], results.get("comparison")
    metric = metric_of(next(iter(networks.values())))
    rows = [
        [metric.title, *(_reached(metric, n) for n in networks.values())],
        ["overall sparsity", *(f"{100 * n['network_sparsity']:.1f} %" for n in networks.values())],
        ["stored parameters", *(f"{n['stored_parameters']:,}" for n in networks.values())],
        ["training state", *(f"{n['training_bytes'] / MIB:.1f} MiB" for n in networks.values())],
        ["median time a step", *(_milliseconds(n["ms_per_step"]) for n in networks.values())],
    ]
    if all("tokens_per_second" in n for n in networks.values()):
        rows.append(["tokens a second", *(f"{n['tokens_per_second']:,.0f}" for n in networks.values())])
    if comparison is None:
        return ["", *networks], rows
    compared = (
        _gap(metric, comparison),
        "",
        _times(comparison["parameters_dense_over_sparse"], "fewer", "more"),
        _times(comparison["bytes_dense_over_sparse"], "smaller", "larger"),
        _time(comparison["time_sparse_over_dense"]),
        *[""] * (len(rows) - 5),
    )
    rows = [[*row, cell] for row, cell in zip(rows, compared, strict=True)]
    rows.insert(1, _equal_time_row(metric, networks, comparison["at_equal_time"]))
    return ["", *networks, "sparse against dense"], rows


def _reached(metric: Metric, network: dict[str, Any]) -> str:
    return f"{mean_and_deviation(network[metric.key], metric.scale, 2)} {metric.unit}".rstrip()


def _equal_time_row(metric: Metric, networks: Iterable[str], reached: dict[str, Any]) -> list[str]:
    """Return what both networks had reached when the faster one was done."""
    values = [reached[name] for name in networks]
    cells = ["not measured" if value is None else metric.text(value) for value in values]
    gap = ""
    if reached["sparse"] is not None and reached["dense"] is not None:
        gap = f"{metric.scale * (reached['sparse'] - reached['dense']):+.2f} {metric.difference}".rstrip()
    return ["at equal time", *cells, gap]


def _milliseconds(spread: dict[str, float | None]) -> str:
    return "not measured" if spread["median"] is None else f"{spread['median']:.2f} ms"


def _gap(metric: Metric, comparison: dict[str, Any]) -> str:
    error = comparison[f"{metric.gap}_standard_error"]
    spread = "" if error is None else f" ± {metric.scale * error:.2f}"
    return f"{metric.scale * comparison[metric.gap]:+.2f}{spread} {metric.difference}".rstrip()


def _time(ratio: dict[str, float | None]) -> str:
    median, low, high = ratio["median"], ratio["low"], ratio["high"]
    if median is None:
        return "not measured"
    words = _times(1 / median, "faster", "SLOWER")
    if low is None or high is None:
        return f"{words}, too few epochs to be sure"
    return "no clear difference" if low <= 1 <= high else words


def _times(ratio: float, better: str, worse: str) -> str:
    """Return a ratio dense / sparse in words, so that nobody has to ask which way round it is."""
    if f"{ratio:.2f}" == "1.00":
        return "the same"
    return f"{ratio:.2f}x {better}" if ratio > 1 else f"{1 / ratio:.2f}x {worse}"


def result_notes(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the notes below the table with their topics: what the numbers are over, and where they were measured."""
    environment, networks = results["environment"], results["networks"]
    metric = metric_of(next(iter(networks.values())))
    seeds = results["config"]["seeds"]
    gap = "; gap ± standard error" if "comparison" in results and seeds > 1 else ""
    ranks = f" on each of {environment['ranks']} ranks" if "ranks" in environment else ""
    on = f"{results['data'][metric.examples]:,} {metric.examples.replace('_', ' ')}"
    notes = [
        (metric.name, f"after the last epoch, {over_seeds(seeds)}{gap}; on {on}"),
        (
            "time",
            f"forward, backward and optimizer on {environment['device']}, {count(environment['threads'], 'thread')}"
            f"{ranks}, {environment['kernels']} kernels",
        ),
    ]
    if "comparison" in results:
        seconds = results["comparison"]["at_equal_time"]["seconds"]
        notes.append(("at equal time", f"{metric.name} that each network had after {seconds:,.0f} seconds of training"))
    ratio = results["comparison"]["time_sparse_over_dense"] if "comparison" in results else {"low": None}
    if ratio["low"] is not None:
        notes.append(
            (
                "ratio",
                f"time of a sparse step / of a dense step, epoch by epoch: median {ratio['median']:.2f}, "
                f"quartiles {ratio['low']:.2f} to {ratio['high']:.2f}; the two networks took turns",
            )
        )
    times = [network["ms_per_step"] for network in networks.values()]
    worst = max((t["highest"] / t["median"] for t in times if t["median"]), default=1.0)
    if worst > BUSY:
        notes.append(
            (
                "busy",
                f"some epoch took {worst:.0f} times as long as usual, probably because another program was busy. "
                "OMP_NUM_THREADS=1 suffers less from it",
            )
        )
    return notes


def written_texts(results: dict[str, Any]) -> dict[str, str]:
    """Return the texts that the networks of the first seed wrote, by network; none where they do not write."""
    return {name: network["written"] for name, network in results["networks"].items() if network.get("written")}


def comparison_cells(rows: Sequence[dict[str, Any]]) -> Cells:
    """Return the table of ``comparison.json``: a row a run."""
    metric = metric_of(rows[0])
    heading = ["method", "sparsity", "overall", "block", metric.label.removeprefix("test "), "to dense"]
    return [*heading, "seconds", "ms/step", "FLOPs", "peak MiB"], [
        [
            row["method"],
            "" if row["sparsity"] is None else percent(row["sparsity"]),
            "" if row["sparsity"] is None else f"{100 * row['network_sparsity']:.1f} %",
            "" if row["block_size"] is None else str(row["block_size"]),
            mean_and_deviation(row[metric.key], metric.scale, 2),
            "" if row["gap_to_dense"] is None else f"{metric.scale * row['gap_to_dense']['mean']:+.2f}",
            mean_and_deviation(row["seconds"], 1, 1),
            "" if row["ms_per_step"] is None else f"{row['ms_per_step']:.2f}",
            _short(row["training_flops"]),
            f"{row['peak_bytes'] / MIB:.1f}",
        ]
        for row in rows
    ]


def comparison_notes(content: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the notes below the table of ``comparison.json``, each with its topic."""
    metric, environment = metric_of(content["rows"][0]), content["environment"]
    spread = over_seeds(content["plan"]["base"]["seeds"])
    return [
        ("sparsity", "of the sparse layers, as asked for; overall: of all weights of the network"),
        (
            metric.name,
            f"after the last epoch, {spread}; to dense: difference{metric.difference and f' in {metric.difference}'}",
        ),
        ("seconds", f"all steps of a training, on {environment['device']}, {count(environment['threads'], 'thread')}"),
        ("FLOPs", "matrix products of a training, at stored elements; scores of updates included"),
        ("peak", "weights, gradients, optimizer and activations at the highest moment of a step"),
    ]


def over_seeds(seeds: int) -> str:
    """Return what a number with a deviation is over."""
    return "one seed" if seeds == 1 else f"mean over {seeds} seeds ± standard deviation"


def markdown(cells: Cells) -> str:
    """Return a table in Markdown, its first column aligned left."""
    heading, rows = cells
    lines = [heading, ["---", *["---:"] * (len(heading) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _short(number: int) -> str:
    """Return a large number such as "1.23T"."""
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number / 1e6:.3g}M"
