"""The picture of how well blocks connect layers over a training. Draws what it is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TITLES = {
    "ramanujan_gap": "Ramanujan gap",
    "weighted_gap": "weighted spectral gap",
    "mean_ramanujan_gap": "Ramanujan gap, mean over degrees",
    "mean_weighted_gap": "weighted spectral gap, mean over degrees",
}
"""Of the measures of :class:`sparsekern.analysis.Spectral`."""

NAMED = 12
"""Layers that a legend can name."""


def draw_spectral(path: Path, title: str, records: Sequence[Mapping[str, Any]]) -> None:
    """Write a picture of the measures of each layer over the steps of a training, a panel a measure.

    Args:
        path: its suffix gives the format, such as ``.png``.
        title: what was trained.
        records: ``{"step": n, "layers": {name: {measure: value or None}}}``, one or more; None is left out.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 4.6), dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=13)
    names = list(records[0]["layers"])
    colours = colormaps["viridis"].resampled(max(2, len(names)))
    for axes, (measure, words) in zip(figure.subplots(1, len(TITLES)), TITLES.items(), strict=True):
        for i, name in enumerate(names):
            known = [(r["step"], v) for r in records if (v := r["layers"][name][measure]) is not None]
            if known:
                axes.plot(*zip(*known, strict=True), color=colours(i), label=name, marker=".", linewidth=1.5)
        if not axes.lines:
            axes.text(0.5, 0.5, "not defined:\ntoo few blocks a row or column", ha="center", transform=axes.transAxes)
        if "ramanujan" in measure:
            axes.axhline(0, color="#888888", linewidth=1, linestyle=":")  # above: as well connected as may be
        axes.set_title(words, fontsize=11)
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if handles and len(names) <= NAMED:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), frameon=False)
    figure.savefig(path)
