"""The pictures of a run and of a comparison, as files."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsekern.lab.config import Config
from sparsekern.lab.history import film
from sparsekern.lab.options import percent
from sparsekern.lab.report.charts import (
    COLOURS,
    DROPPED,
    GROWN,
    KEPT,
    curves_of,
    draw_curves,
    palette,
    panel_gap,
    save_figure,
    shades,
    taps,
)
from sparsekern.lab.tasks import Metric, metric_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

logger = logging.getLogger("sparsekern")

TITLE_WIDTH = 36
"""Letters that fit above a picture of blocks; a longer title takes two lines."""

MARKERS = "osD^vP*X"

GRAPHS = {
    "ramanujan_gap": ("Ramanujan gap", "0 or more: about as good as so few blocks allow"),
    "weighted_gap": ("weighted spectral gap", "larger: better connected, blocks weighed by size"),
    "mean_ramanujan_gap": ("Ramanujan gap of regular parts", "the same, mean over block columns of equal degree"),
    "mean_weighted_gap": (
        "weighted spectral gap of regular parts",
        "the same, mean over block columns of equal degree",
    ),
}
"""Title and meaning of the measures of :class:`sparsekern.analysis.Spectral`."""

NAMED = 12
"""Layers that a legend can name."""


def draw_or_warn(path: Path, draw: Callable[[Path], object]) -> None:
    """Draw a picture of results that are already written; an error becomes a warning."""
    try:
        draw(path)
    except Exception as error:  # whatever it is, the training is done
        logger.warning("%s is not drawn (%s: %s); the results are complete", path, type(error).__name__, error)


def run_title(config: Config, data: str) -> str:
    """Return what a run trains, on one line."""
    title = f"{data}: {config.network_title}, "
    if not config.sparse:
        return title + "dense"
    side, twin = config.block_size, " beside its dense twin" if config.dense else ""
    sparse = f"{config.sparse_title} {percent(config.sparsity)} sparse"
    return f"{title}{sparse} (blocks of {side} x {side}; {config.method_title}){twin}"


def network_labels(config: Config) -> dict[str, str]:
    """Return the label of each network of a run in a legend."""
    labels = {"sparse": f"{percent(config.sparsity)} sparse", "dense": "dense twin"}
    return {network: labels[network] for network in config.networks}


def draw_summary(
    path: Path, config: Config, results: dict[str, Any], rows: Sequence[dict[str, Any]], history: dict[str, Any]
) -> None:
    """Draw the metric and the loss of all seeds, and the blocks of one layer of seed 0 at the start and at the end.

    Args:
        path: of the picture; its suffix gives the format, such as ``.png``.
        config: of the run.
        results: its ``results.json``.
        rows: of ``metrics.jsonl``.
        history: of the blocks of seed 0, from :class:`~sparsekern.lab.history.History`. The layer with most places is
            shown, of several the first: the first layers of a convolutional network have too few.
    """
    from matplotlib.figure import Figure

    networks = results["networks"]
    metric = metric_of(rows[0])
    labels = network_labels(config)
    reached = ", ".join(
        f"{name} {metric.text(network[metric.key]['mean'], metric.digits)}" for name, network in networks.items()
    )
    stored = " against ".join(f"{network['stored_parameters']:,}" for network in networks.values())
    name, layer = max(history["layers"].items(), key=lambda item: item[1]["rows"] * item[1]["cols"])
    start, frames = film(history, name)
    height = 4.9 if taps(layer["kernel"]) == (1, 1) else 5.7  # the labels of a kernel take two lines
    figure = Figure(figsize=(16, height), dpi=110, layout="constrained")
    figure.suptitle(
        f"{run_title(config, results['data']['name'])}\n"
        f"{metric.title} after {config.epochs} epochs: {reached};  stored parameters: {stored}",
        fontsize=13,
    )
    left, middle, before, after = figure.subplots(1, 4, width_ratios=(1.15, 1.15, 1, 1))
    draw_curves(left, curves_of(rows, labels, metric.key, metric.scale), metric.label)
    draw_curves(middle, curves_of(rows, labels, "loss"), "training loss", log=True)
    end = frames[-1]
    titled = f"layer {name} of seed 0 at the"
    _draw_blocks(before, layer, start, end.kept, (frames[0].blocks[0], end.blocks[1]), f"{titled} start")
    _draw_blocks(after, layer, end.now, end.kept, end.blocks, f"{titled} end")
    save_figure(figure, path)


def _draw_blocks(
    axes: Axes, layer: dict[str, Any], image: Tensor, kept: Tensor, blocks: tuple[int, int], title: str
) -> None:
    """Draw how full each pixel of a layer is, ``(H, W)``: of blocks that are there at both times, or at this one only.

    Args:
        axes: to draw on.
        layer: what a film says of it.
        image, kept: ``(H, W)`` uint8: of all blocks at this time, and of those that are there at both.
        blocks: the number of both.
        title: layer and time.
    """
    from matplotlib.patches import Patch

    at_start = title.endswith("start")
    rows, cols, kernel, unit = layer["rows"], layer["cols"], taps(layer["kernel"]), "channels"
    only, name = (DROPPED, "dropped later") if at_start else (GROWN, "grown since")
    shown = shades(image.numpy(), kept.numpy(), 0 * image.numpy(), int(image.max()), layer["kernel"])
    count, both = blocks
    share = f"{count} of {rows * cols} blocks, {100 * count / (rows * cols):.3g} %"
    axes.set_title(f"{textwrap.fill(title, TITLE_WIDTH)}\n{share}", fontsize=11)
    if layer["kernel"] is None:
        unit = "features"
    size = f"(of {layer['block'][1]} {unit})"
    if kernel == (1, 1):
        axes.imshow(palette(only)[shown], interpolation="nearest", extent=(-0.5, cols - 0.5, rows - 0.5, -0.5))
        _label_blocks(axes, rows, cols, size)
    else:
        axes.imshow(palette(only)[shown], interpolation="nearest")
        height, width = image.shape
        _label_panels(axes, height, width, kernel, size)
    entries = [Patch(color=KEPT, label=f"{'stays' if at_start else 'kept from the start'} ({both})")]
    if count > both:
        entries.append(Patch(color=only, label=f"{name} ({count - both})"))
    axes.legend(
        handles=entries,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.14 if kernel == (1, 1) else -0.2),
        ncols=2,
        frameon=False,
        handlelength=1,
    )


def _label_blocks(axes: Axes, rows: int, cols: int, size: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(f"input block {size}")
    axes.set_ylabel("output block")
    for axis, blocks, others in ((axes.xaxis, cols, rows), (axes.yaxis, rows, cols)):
        # a narrow side has room for fewer numbers; a single row has a single tick
        bins = max(1, min(9, round(12 * blocks / others)))
        axis.set_major_locator(MaxNLocator(bins, integer=True, min_n_ticks=1))


def _label_panels(axes: Axes, rows: int, cols: int, kernel: tuple[int, int], size: str) -> None:
    kh, kw = kernel
    gap = panel_gap(rows, cols // (kh * kw))
    tall, wide = rows + gap, cols // (kh * kw) + gap
    axes.set_xticks([i * wide + (wide - gap - 1) / 2 for i in range(kw)], [str(i) for i in range(kw)])
    axes.set_yticks([i * tall + (tall - gap - 1) / 2 for i in range(kh)], [str(i) for i in range(kh)])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(
        f"column of the {kh} x {kw} kernel; in each of its {kh * kw} panels,\nleft to right: input block {size}"
    )
    axes.set_ylabel("row of the kernel; in each panel,\ntop to bottom: output block")


def draw_graphs(path: Path, config: Config, results: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Draw the spectral measures of each layer of seed 0 by step, a panel a measure, if the run recorded them.

    Args:
        path: of the picture; its suffix gives the format.
        config: of the run.
        results: its ``results.json``.
        rows: of ``metrics.jsonl``. A measure that is None is left out.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    records = [record for row in rows if row["seed"] == 0 for record in row.get("spectral", ())]
    if not records:
        return
    names = list(records[0]["layers"])
    lines = {
        measure: {
            name: known
            for name in names
            if (known := [(r["step"], v) for r in records if (v := r["layers"][name][measure]) is not None])
        }
        for measure in GRAPHS
    }
    shown = [measure for measure in GRAPHS if lines[measure]]
    figure = Figure(figsize=(4.6 * max(2, len(shown)), 4.6), dpi=110, layout="constrained")
    network = f"{results['data']['name']}: {config.network_title}, {percent(config.sparsity)} sparse"
    figure.suptitle(f"{network} ({config.method_title}), block graphs of seed 0", fontsize=13)
    if not shown:
        words = "No measure is defined: fewer than three blocks in a block row or column."
        figure.text(0.5, 0.5, words, ha="center")
        save_figure(figure, path)
        return
    colours = colormaps["viridis"].resampled(max(2, len(names)))
    for axes, measure in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        for name, known in lines[measure].items():
            colour = colours(names.index(name))
            axes.plot(*zip(*known, strict=True), color=colour, label=name, marker=".", linewidth=1.5)
        if "ramanujan" in measure:
            axes.axhline(0, color="#888888", linewidth=1, linestyle=":")
        axes.set_title("\n".join(GRAPHS[measure]), fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if len(names) <= NAMED:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), frameon=False)
    else:
        figure.supxlabel(f"{len(names)} layers, the first ones dark and the last ones bright", fontsize=10)
    save_figure(figure, path)


def draw_comparison(path: Path, title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Draw the metric against sparsity: a panel a block size, a line a method, error bars of one standard deviation.

    Args:
        path: of the picture; its suffix gives the format.
        title: what was trained.
        rows: of the comparison. The dense twin is a band across every panel.
    """
    from matplotlib.figure import Figure

    metric = metric_of(rows[0])
    blocks = sorted({row["block_size"] for row in rows if row["block_size"] is not None})
    methods = list(dict.fromkeys(row["method"] for row in rows if row["block_size"] is not None))
    figure = Figure(figsize=(6 * max(1, len(blocks)), 5), dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=13)
    axes_of_blocks = figure.subplots(1, max(1, len(blocks)), sharey=True, squeeze=False)[0]
    twins = [row[metric.key] for row in rows if row["block_size"] is None]
    for axes, block in zip(axes_of_blocks, blocks, strict=False):
        for twin in twins:
            mean, deviation = metric.scale * twin["mean"], metric.scale * (twin["standard_deviation"] or 0)
            axes.axhline(mean, color="#777777", linestyle="--", linewidth=1.5, label="dense")
            axes.axhspan(mean - deviation, mean + deviation, color="#777777", alpha=0.15, linewidth=0)
        own = sorted((row for row in rows if row["block_size"] == block), key=lambda row: row["network_sparsity"])
        ticks = list(dict.fromkeys(percent(row["sparsity"]) for row in own))
        for number, method in enumerate(methods):
            places = {ticks.index(percent(row["sparsity"])): row for row in own if row["method"] == method}
            _draw_method(axes, metric, method, (number, len(methods)), places)
        axes.set_xticks(range(len(ticks)), [tick.replace(", ", ",\n") for tick in ticks])
        axes.set_xlim(-0.5, len(ticks) - 0.5)  # one sparsity: all points stand near its tick
        axes.set_title(f"blocks of {block} x {block}", fontsize=11)
        axes.set_xlabel("sparsity of the sparse layers")
        axes.grid(alpha=0.25)
    several = any(row[metric.key]["standard_deviation"] is not None for row in rows)
    axes_of_blocks[0].set_ylabel(metric.label + ": mean and deviation over seeds" * several)
    handles: dict[str, Any] = {}
    for axes in axes_of_blocks:
        lines, labels = axes.get_legend_handles_labels()
        handles |= dict(zip(labels, lines, strict=True))
    if handles:
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4, frameon=False)
    save_figure(figure, path)


def _draw_method(
    axes: Axes, metric: Metric, method: str, turn: tuple[int, int], rows: Mapping[int, dict[str, Any]]
) -> None:
    """Draw the ``rows`` of a method at their places, a little beside those of the others, so that all bars show."""
    number, methods = turn
    aside = 0.3 * (number - (methods - 1) / 2) / max(1, methods)
    axes.errorbar(
        [place + aside for place in rows],
        [metric.scale * row[metric.key]["mean"] for row in rows.values()],
        [metric.scale * (row[metric.key]["standard_deviation"] or 0) for row in rows.values()],
        color=COLOURS[number % len(COLOURS)],
        marker=MARKERS[number % len(MARKERS)],
        markersize=6,
        capsize=3,
        linewidth=1.5,
        label=method,
    )
