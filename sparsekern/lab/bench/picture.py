"""The picture of ``sparsekern bench``: times as fast as dense over sparsity, a panel for each layer."""

from __future__ import annotations

import math
from pathlib import Path

from sparsekern.lab.bench.results import contestants, curve, group_title, groups
from sparsekern.lab.bench.run import FORWARD, Row
from sparsekern.lab.report.charts import COLOURS, save_figure

MOST = 12
"""Panels of one picture at most."""

LINES = {FORWARD: ("--", "o"), "forward + backward": ("-", "s")}
"""Line and marker of a pass."""


def draw_bench(path: Path, rows: list[Row], place: str) -> int:
    """Draw the picture and return how many layers are not in it, for want of room.

    Args:
        path: of the picture; its suffix gives the format.
        rows: of the report.
        place: where it was measured.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    panels = list(groups(rows).items())
    shown = panels[:MOST]
    across = min(len(shown), 3)
    down = math.ceil(len(shown) / across)
    figure = Figure(figsize=(max(6.4, 4.6 * across), 3.9 * down + 0.6), layout="constrained")
    figure.suptitle(f"times as fast as dense\n{place}", fontsize=10)
    for number, (group, mine) in enumerate(shown, 1):
        axes = figure.add_subplot(down, across, number)
        axes.set_title(group_title(group), fontsize=9)
        places = sorted({row["sparsity"] for row in mine})
        axes.plot(places, [1 / (1 - s) for s in places], color="0.6", linestyle=":", label="ideal: 1 / density")
        axes.axhline(1, color="0.2", linewidth=1)
        for colour, name in zip(COLOURS, contestants(mine), strict=False):
            for which in dict.fromkeys(row["pass"] for row in mine):
                line, marker = LINES[which]
                if points := curve(mine, which, name):
                    label = f"{name}, {which}"
                    axes.plot(*zip(*points, strict=True), line, marker=marker, markersize=4, color=colour, label=label)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks(places, [f"{100 * s:g} %" for s in places], rotation=45 if len(places) > 4 else 0)
        axes.set_xlabel("sparsity")
        axes.grid(visible=True, alpha=0.25)
        axes.legend(fontsize=7)
    save_figure(figure, path)
    return len(panels) - len(shown)
