"""The table at the end of a run, and the notes below it."""

from __future__ import annotations

from typing import Any

from rich.table import Table

MIB = 2**20


def result_table(results: dict[str, Any]) -> Table:
    """Return the table of ``results.json``: a row a quantity, a column a network, and what the comparison says."""
    config, networks = results["config"], results["networks"]
    comparison = results.get("comparison")
    table = Table(
        title=f"{results['data']['name']}: {100 * config['sparsity']:g} % sparse in blocks of {config['block_size']}, "
        f"{config['method']}, width {config['width']}",
        title_justify="left",
    )
    table.add_column("")
    for name in networks:
        table.add_column(name, justify="right")
    if comparison is not None:
        table.add_column("sparse against dense")
    for label, show, compare in (
        ("test accuracy", _accuracy, _gap),
        ("stored parameters", lambda n: f"{n['stored_parameters']:,}", _parameters),
        ("training state", lambda n: f"{n['training_bytes'] / MIB:.1f} MiB", _bytes),
        ("median time a step", lambda n: _milliseconds(n["ms_per_step"]), _time),
    ):
        cells = [show(network) for network in networks.values()]
        table.add_row(label, *cells, *([] if comparison is None else [compare(comparison)]))
    return table


def _accuracy(network: dict[str, Any]) -> str:
    accuracy = network["test_accuracy"]
    deviation = accuracy["standard_deviation"]
    spread = "" if deviation is None else f" ± {100 * deviation:.2f}"
    return f"{100 * accuracy['mean']:.2f}{spread} %"


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
    ratio = comparison["time_dense_over_sparse"]["median"]
    return "not measured" if ratio is None else _times(ratio, "faster", "SLOWER")


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
    if config["dense"] and seeds > 1:
        lines[0] += "; gap ± standard error"
    lines.append(
        f"time      forward, backward and optimizer on {environment['device']}, {environment['threads']} threads, "
        f"{environment['kernels']} kernels"
    )
    ratio = results["comparison"]["time_dense_over_sparse"] if config["dense"] else {"low": None}
    if ratio["low"] is not None:
        lines.append(
            f"ratio     dense / sparse {ratio['median']:.2f}, quartiles {ratio['low']:.2f} to {ratio['high']:.2f} over "
            "epochs; the two networks took turns"
        )
    return "\n".join(lines)
