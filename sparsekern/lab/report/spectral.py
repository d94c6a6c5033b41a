"""The picture of how well blocks connect layers over a training. Draws what it is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsekern.lab.report.plots import save_figure

TITLES = {
    "ramanujan_gap": "Ramanujan gap",
    "weighted_gap": "weighted spectral gap",
    "mean_ramanujan_gap": "Ramanujan gap of regular parts",
    "mean_weighted_gap": "weighted spectral gap of regular parts",
}
"""Of the measures of :class:`sparsekern.analysis.Spectral`."""

MEANINGS = {
    "ramanujan_gap": "0 or more: about as good as so few blocks allow",
    "weighted_gap": "larger: better connected, blocks weighed by size",
    "mean_ramanujan_gap": "the same, mean over block columns of equal degree",
    "mean_weighted_gap": "the same, mean over block columns of equal degree",
}
"""What a reader is to look for."""

NAMED = 12
"""Layers that a legend can name."""


def draw_spectral(path: Path, title: str, records: Sequence[Mapping[str, Any]]) -> None:
    """Write a picture of the measures of each layer over the steps of a training, a panel a measure that is defined.

    Args:
        path: its suffix gives the format, such as ``.png``.
        title: what was trained.
        records: ``{"step": n, "layers": {name: {measure: value or None}}}``, one or more; None is left out.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    names = list(records[0]["layers"])
    lines = {
        measure: {
            name: known
            for name in names
            if (known := [(r["step"], v) for r in records if (v := r["layers"][name][measure]) is not None])
        }
        for measure in TITLES
    }
    shown = [measure for measure in TITLES if lines[measure]]
    figure = Figure(figsize=(4.6 * max(2, len(shown)), 4.6), dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=13)
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
        axes.set_title(f"{TITLES[measure]}\n{MEANINGS[measure]}", fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if len(names) <= NAMED:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), frameon=False)
    else:
        figure.supxlabel(f"{len(names)} layers, the first ones dark and the last ones bright", fontsize=10)
    save_figure(figure, path)
