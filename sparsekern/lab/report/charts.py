"""Line charts as SVG to be put into a page."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sparsekern.lab.report.plots import COLOURS, Curves, draw_curves, scale_by_factors
from sparsekern.lab.report.text import draw_as_written

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE = (5.2, 3.1)
"""Inches of a chart; a page scales it."""

FEW = 6
"""Lines up to which each has a colour and a name."""


def curve_chart(curves: Sequence[Curves], what: str, *, log: bool = False) -> str:
    """Return the chart of one quantity of several networks: mean and range over seeds, by epoch.

    Args:
        curves: of at least one epoch.
        what: the quantity, as the title.
        log: whether the scale is logarithmic, where there is more than one epoch.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    draw_curves(axes, curves, what)
    if log and max(len(seed) for curve in curves for seed in curve.by_seed) > 1:
        scale_by_factors(axes)
    return _svg(figure)


def layer_chart(lines: Mapping[str, Sequence[float]], what: str) -> str:
    """Return the chart of one quantity of several layers, in percent, by epoch from 1 on.

    Up to :data:`FEW` layers have a line each, thinner ones over thicker ones, so that equal lines are all seen. Of more
    the lines are grey, and their median has the colour.
    """
    import numpy
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    epochs = range(1, max(map(len, lines.values())) + 1)
    marker = "o" if len(epochs) == 1 else ""
    if len(lines) <= FEW:
        for number, (name, line) in enumerate(lines.items()):
            colour, width = COLOURS[number % len(COLOURS)], 1.5 + 2 * (len(lines) - 1 - number)
            axes.plot(epochs, line, color=colour, linewidth=width, label=name, marker=marker, alpha=0.85)
    else:
        for line in lines.values():
            axes.plot(epochs, line, color="#a8a8a0", linewidth=0.7, alpha=0.7)
        median = numpy.median([list(line) for line in lines.values()], axis=0)
        axes.plot(epochs, median, color=COLOURS[0], linewidth=2.5, label=f"median of {len(lines)} layers")
    axes.set_title(what, fontsize=11)
    axes.set_xlabel("epoch")
    axes.set_ylabel("%")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(0.5, len(epochs) + 0.5)
    axes.set_ylim(0, 1.08 * max((max(line) for line in lines.values()), default=0) or 1)  # a level line stands clear
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    return _svg(figure)


def _svg(figure: Figure) -> str:
    """Return the figure as an ``<svg>`` element, the same for the same figure; its text stays text."""
    import matplotlib

    figure.patch.set_alpha(0)
    draw_as_written(figure)
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sparsekern"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return text[text.index("<svg") :].replace('width="', 'data-width="', 1).replace('height="', 'data-height="', 1)
