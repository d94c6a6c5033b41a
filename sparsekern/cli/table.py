"""The table at the end of a run, and the notes below it."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from sparsekern.lab import Config

MIB = 2**20

DENSE = ("", "", ", first and last layer dense")
"""What stays dense, by how many layers do; where it is one, the words for the sparse ones say it."""

BUSY = 3
"""An epoch this many times slower than the median one is worth a note."""


def result_table(results: dict[str, Any]) -> Table:
    """Return the table of ``results.json``: a row a quantity, a column a network, and what the comparison says."""
    config, networks = results["config"], results["networks"]
    titles = Config.from_json(config)
    sparse = "dense"
    if "sparse" in networks:
        sparse = (
            f"{titles.sparse_title} {100 * networks['sparse']['sparsity']:.1f} % sparse in blocks of "
            f"{config['block_size']} ({titles.method_title}){DENSE[len(titles.kept_dense)]}"
        )
    table = Table(title=f"{results['data']['name']}, {titles.network_title}: {sparse}", title_justify="left")
    heading, rows = result_cells(results)
    for number, name in enumerate(heading):
        table.add_column(name, justify="right" if 0 < number <= len(networks) else "left")
    for row in rows:
        table.add_row(*row)
    return table


def result_cells(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the heading and the rows of the table, as text."""
    networks, comparison = results["networks"], results.get("comparison")
    rows = []
    for label, show, compare in (
        ("test accuracy", _accuracy, _gap),
        ("overall sparsity", _absent, lambda comparison: ""),
        ("stored parameters", lambda n: f"{n['stored_parameters']:,}", _parameters),
        ("training state", lambda n: f"{n['training_bytes'] / MIB:.1f} MiB", _bytes),
        ("median time a step", lambda n: _milliseconds(n["ms_per_step"]), _time),
    ):
        cells = [show(network) for network in networks.values()]
        rows.append([label, *cells, *([] if comparison is None else [compare(comparison)])])
    return ["", *networks, *([] if comparison is None else ["sparse against dense"])], rows


def thread_count(threads: int) -> str:
    """Return a number of threads in words, such as ``1 thread``."""
    return f"{threads} thread{'s' * (threads != 1)}"


def _accuracy(network: dict[str, Any]) -> str:
    accuracy = network["test_accuracy"]
    deviation = accuracy["standard_deviation"]
    spread = "" if deviation is None else f" ± {100 * deviation:.2f}"
    return f"{100 * accuracy['mean']:.2f}{spread} %"


def _absent(network: dict[str, Any]) -> str:
    share = network.get("network_sparsity")  # older runs have none
    return "not recorded" if share is None else f"{100 * share:.1f} %"


def _milliseconds(spread: dict[str, float | None]) -> str:
    return "not measured" if spread["median"] is None else f"{spread['median']:.2f} ms"


def _gap(comparison: dict[str, Any]) -> str:
    error = comparison["accuracy_gap_standard_error"]
    spread = "" if error is None else f" ± {100 * error:.2f}"
    return f"{100 * comparison['accuracy_gap']:+.2f}{spread} points"


def _parameters(comparison: dict[str, Any]) -> str:
    return _times(comparison["parameters_dense_over_sparse"], "fewer", "more")


def _bytes(comparison: dict[str, Any]) -> str:
    return _times(comparison["bytes_dense_over_sparse"], "smaller", "larger")


def _time(comparison: dict[str, Any]) -> str:
    ratio = comparison["time_sparse_over_dense"]
    if ratio["median"] is None:
        return "not measured"
    words = _times(1 / ratio["median"], "faster", "SLOWER")
    if ratio["low"] is None:
        return f"{words}, too few epochs to be sure"
    return "no clear difference" if ratio["low"] <= 1 <= ratio["high"] else words


def _times(ratio: float, better: str, worse: str) -> str:
    """Say a ratio dense / sparse in words, so that nobody has to ask which way round it is."""
    if f"{ratio:.2f}" == "1.00":
        return "the same"
    return f"{ratio:.2f}x {better}" if ratio > 1 else f"{1 / ratio:.2f}x {worse}"


def notes(results: dict[str, Any]) -> str:
    """Return what a reader of the table must know: what the numbers are over, and where they were measured."""
    config, environment = results["config"], results["environment"]
    seeds = config["seeds"]
    accuracy = "one seed" if seeds == 1 else f"mean over {seeds} seeds ± standard deviation"
    lines = [f"accuracy  after the last epoch, {accuracy}"]
    if "comparison" in results and seeds > 1:
        lines[0] += "; gap ± standard error"
    lines[0] += f"; on {results['data']['test_images']:,} test images"
    lines.append(
        f"time      forward, backward and optimizer on {environment['device']}, "
        f"{thread_count(environment['threads'])}, {environment['kernels']} kernels"
    )
    ratio = results["comparison"]["time_sparse_over_dense"] if "comparison" in results else {"low": None}
    if ratio["low"] is not None:
        lines.append(
            f"ratio     time of a sparse step / of a dense step, epoch by epoch: median {ratio['median']:.2f}, "
            f"quartiles {ratio['low']:.2f} to {ratio['high']:.2f}; the two networks took turns"
        )
    times = [network["ms_per_step"] for network in results["networks"].values()]
    worst = max((t["highest"] / t["median"] for t in times if t["median"]), default=1.0)
    if worst > BUSY:
        lines.append(
            f"busy      some epoch took {worst:.0f} times as long as usual, probably because another program was "
            "busy. OMP_NUM_THREADS=1 suffers less from it"
        )
    return "\n".join(lines)
