"""The table and the picture of a comparison of methods. Only draws what it is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsekern.lab.report.plots import COLOURS, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEADINGS = (
    "method",
    "sparsity",
    "overall",
    "block",
    "accuracy (%)",
    "to dense",
    "seconds",
    "ms/step",
    "FLOPs",
    "peak MiB",
)

MARKERS = "osD^vP*X"


def table_cells(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return the texts of the table: a row each, as many as :data:`HEADINGS`."""
    return [
        (
            row["method"],
            "" if row["sparsity"] is None else f"{100 * row['sparsity']:.4g} %",
            _overall(row),
            "" if row["block_size"] is None else str(row["block_size"]),
            _spread(row["test_accuracy"], 100, 2),
            "" if row["gap_to_dense"] is None else f"{100 * row['gap_to_dense']['mean']:+.2f}",
            _spread(row["seconds"], 1, 1),
            "" if row["ms_per_step"] is None else f"{row['ms_per_step']:.2f}",
            _short(row["training_flops"]),
            f"{row['peak_bytes'] / 2**20:.1f}",
        )
        for row in rows
    ]


def _overall(row: dict[str, Any]) -> str:
    known = row["sparsity"] is not None and row.get("network_sparsity") is not None
    return f"{100 * row['network_sparsity']:.1f} %" if known else ""


def _spread(numbers: dict[str, Any], scale: float, digits: int) -> str:
    deviation = numbers["standard_deviation"]
    spread = "" if deviation is None else f" ± {scale * deviation:.{digits}f}"
    return f"{scale * numbers['mean']:.{digits}f}{spread}"


def _short(number: int) -> str:
    """Return a large number such as "1.23T"."""
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number / 1e6:.3g}M"


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table in Markdown."""
    lines = [HEADINGS, ("---", *["---:"] * (len(HEADINGS) - 1)), *table_cells(rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw_comparison(path: Path, title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Write a picture of accuracy against sparsity: a panel a block size, a line a method, error bars of a deviation.

    Args:
        path: its suffix gives the format, such as ``.png``.
        title: what was trained.
        rows: of the comparison. The dense twin is a band across every panel.
    """
    from matplotlib.figure import Figure

    blocks = sorted({row["block_size"] for row in rows if row["block_size"] is not None})
    methods = list(dict.fromkeys(row["method"] for row in rows if row["block_size"] is not None))
    figure = Figure(figsize=(6 * max(1, len(blocks)), 5), dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=13)
    panels = figure.subplots(1, max(1, len(blocks)), sharey=True, squeeze=False)[0]
    for axes, block in zip(panels, blocks, strict=False):
        _draw_twin(axes, rows)
        ticks = sorted({row["sparsity"] for row in rows if row["block_size"] == block})
        for number, method in enumerate(methods):
            mine = {row["sparsity"]: row for row in rows if (row["method"], row["block_size"]) == (method, block)}
            places = {place: mine[sparsity] for place, sparsity in enumerate(ticks) if sparsity in mine}
            _draw_method(axes, method, number, len(methods), places)
        axes.set_xticks(range(len(ticks)), [f"{100 * tick:.4g}" for tick in ticks])
        axes.set_xlim(-0.5, len(ticks) - 0.5)  # one sparsity: all points stand near its tick
        axes.set_title(f"blocks of {block} x {block}", fontsize=11)
        axes.set_xlabel("sparsity of the sparse layers (%)")
        axes.grid(alpha=0.25)
    several = any(row["test_accuracy"]["standard_deviation"] is not None for row in rows)
    panels[0].set_ylabel("test accuracy (%)" + ": mean and deviation over seeds" * several)
    handles: dict[str, Any] = {}
    for axes in panels:
        lines, labels = axes.get_legend_handles_labels()
        handles |= dict(zip(labels, lines, strict=True))
    if handles:
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4, frameon=False)
    save_figure(figure, path)


def _draw_twin(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        if row["block_size"] is None:
            mean, deviation = (100 * (row["test_accuracy"][key] or 0) for key in ("mean", "standard_deviation"))
            axes.axhline(mean, color="#777777", linestyle="--", linewidth=1.5, label="dense")
            axes.axhspan(mean - deviation, mean + deviation, color="#777777", alpha=0.15, linewidth=0)


def _draw_method(axes: Axes, method: str, number: int, of: int, rows: Mapping[int, dict[str, Any]]) -> None:
    """Draw one method, a row at each place.

    Its points stand a little beside those of the others, so that all error bars are seen.
    """
    aside = 0.3 * (number - (of - 1) / 2) / max(1, of)
    axes.errorbar(
        [place + aside for place in rows],
        [100 * row["test_accuracy"]["mean"] for row in rows.values()],
        [100 * (row["test_accuracy"]["standard_deviation"] or 0) for row in rows.values()],
        color=COLOURS[number % len(COLOURS)],
        marker=MARKERS[number % len(MARKERS)],
        markersize=6,
        capsize=3,
        linewidth=1.5,
        label=method,
    )
