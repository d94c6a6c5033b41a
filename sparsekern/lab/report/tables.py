"""The tables of a run and of a comparison, as text."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

from sparsekern.lab.config import Config
from sparsekern.lab.options import percent
from sparsekern.lab.tasks import Metric, metric_of

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
    both = list(networks.values())
    metric, medians = metric_of(both[0]), [network["ms_per_step"]["median"] for network in both]
    rows = [
        [metric.title, *(f"{mean_and_deviation(n[metric.key], metric.scale, 2)} {metric.unit}".rstrip() for n in both)],
        ["overall sparsity", *(f"{100 * n['network_sparsity']:.1f} %" for n in both)],
        ["stored parameters", *(f"{n['stored_parameters']:,}" for n in both)],
        ["training state", *(f"{n['training_bytes'] / MIB:.1f} MiB" for n in both)],
        ["median time a step", *("not measured" if ms is None else f"{ms:.2f} ms" for ms in medians)],
    ]
    if all("tokens_per_second" in n for n in both):
        rows.append(["tokens a second", *(f"{n['tokens_per_second']:,.0f}" for n in both)])
    if comparison is None:
        return ["", *networks], rows
    compared = (
        metric.gap_text(comparison[metric.gap], comparison[f"{metric.gap}_standard_error"]),
        "",
        _times(comparison["parameters_dense_over_sparse"], "fewer", "more"),
        _times(comparison["bytes_dense_over_sparse"], "smaller", "larger"),
        _time(comparison["time_sparse_over_dense"]),
        *[""] * (len(rows) - 5),
    )
    rows = [[*row, cell] for row, cell in zip(rows, compared, strict=True)]
    rows.insert(1, _equal_time_row(metric, networks, comparison["at_equal_time"]))
    return ["", *networks, "sparse against dense"], rows


def _equal_time_row(metric: Metric, networks: Iterable[str], reached: dict[str, Any]) -> list[str]:
    """Return what both networks had reached when the faster one was done."""
    values = [reached[name] for name in networks]
    cells = ["not measured" if value is None else metric.text(value) for value in values]
    gap = ""
    if reached["sparse"] is not None and reached["dense"] is not None:
        gap = metric.gap_text(reached["sparse"] - reached["dense"])
    return ["at equal time", *cells, gap]


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


OBEYED = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode categories that are not for reading: controls, formats (such as the direction of writing), surrogates, line
and paragraph separators."""

LAYOUT = "\n\t"
"""Control characters that text may contain."""


def printable(text: str) -> str:
    r"""Return the text with every character that is not for reading as its escape, such as ``\x1b``.

    A terminal obeys escape sequences: a name can clear the screen, fill the clipboard, or reverse the text behind it. A
    surrogate, which Python makes of a file name that is not UTF-8, cannot be encoded at all.
    """
    if text.isprintable():
        return text
    obeyed = {c for c in text if unicodedata.category(c) in OBEYED and c not in LAYOUT}
    return "".join(c.encode("unicode_escape").decode() if c in obeyed else c for c in text)


def count(number: int, thing: str) -> str:
    """Return a number of things, such as "1 thread" or "2 threads"."""
    return f"{number:,} {thing}{'s' * (number != 1)}"


def mean_and_deviation(numbers: dict[str, Any], scale: float, digits: int) -> str:
    """Return the ``mean`` over seeds and, if there is one, the ``standard_deviation``, such as "97.89 ± 0.21"."""
    deviation = numbers["standard_deviation"]
    spread = "" if deviation is None else f" ± {scale * deviation:.{digits}f}"
    return f"{scale * numbers['mean']:.{digits}f}{spread}"


def aligned(notes: Sequence[tuple[str, str]]) -> str:
    """Return notes on a line each, behind their topics."""
    width = max(len(topic) for topic, _ in notes) + 2
    return "\n".join(f"{topic:<{width}}{text}" for topic, text in notes)
