"""Lines over epochs, alone as SVG for a page or as a part of a picture. No global state of matplotlib is touched."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsekern.files.atomic_files import replace
from sparsekern.lab.report.tables import printable

if TYPE_CHECKING:
    import numpy
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0b6e99", "#c4570c", "#5b8c2a", "#7a4fa3", "#b8860b", "#b03060", "#2a9d8f", "#444444")
"""One a curve. The first four differ without colour vision too; every curve has a label as well."""

SIZE = (5.2, 3.1)
"""Inches of a chart; a page scales it."""

FEW = 6
"""Lines up to which each has a colour and a name."""

Curves = Mapping[str, Sequence[Sequence[float]]]
"""By the label of a network, its numbers ``[seed][epoch]``. Seeds of an unfinished run differ in length."""


def curves_of(rows: Iterable[Mapping[str, Any]], labels: Mapping[str, str], key: str, scale: float = 1) -> Curves:
    """Return the curves of one number of a run.

    Args:
        rows: of ``metrics.jsonl``.
        labels: of the networks, by their names. Those that have no row yet are left out.
        key: of the number.
        scale: times which it is drawn.
    """
    curves: dict[str, dict[int, list[float]]] = {}
    for network, label in labels.items():
        for row in rows:
            if row["network"] == network:
                curves.setdefault(label, {}).setdefault(row["seed"], []).append(scale * row[key])
    return {label: list(by_seed.values()) for label, by_seed in curves.items()}


def draw_curves(axes: Axes, curves: Curves, what: str, *, log: bool = False) -> None:
    """Draw the mean over seeds and a band from the lowest to the highest, by epoch. A later epoch may have fewer seeds.

    Args:
        axes: to draw on.
        curves: of at least one epoch.
        what: the quantity, as the title.
        log: whether the scale is logarithmic, where there is more than one epoch.
    """
    import numpy

    longest = max(len(seed) for by_seed in curves.values() for seed in by_seed)
    for colour, (label, by_seed) in zip(COLOURS, curves.items(), strict=False):
        length = max(map(len, by_seed))
        seeds = numpy.ma.masked_invalid([[*seed, *[numpy.nan] * (length - len(seed))] for seed in by_seed])
        epochs = numpy.arange(1, length + 1)
        axes.fill_between(epochs, seeds.min(0), seeds.max(0), color=colour, alpha=0.2, linewidth=0)
        axes.plot(epochs, seeds.mean(0), color=colour, linewidth=2, label=label, marker="." * (length == 1))
    count = max(map(len, curves.values()))
    _set_epochs(axes, what if count == 1 else f"{what}: mean and range of {count} seeds", longest)
    axes.legend(loc="best", labelcolor="linecolor", frameon=False, fontsize=11)
    if log and longest > 1:
        scale_by_factors(axes)


def _set_epochs(axes: Axes, what: str, epochs: int) -> None:
    """Give axes a title and a horizontal scale of that many epochs."""
    from matplotlib.ticker import MaxNLocator

    axes.set_title(what, fontsize=11)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(0.5, epochs + 0.5)
    axes.grid(alpha=0.25)


def scale_by_factors(axes: Axes) -> None:
    """Make the vertical scale logarithmic, with plain numbers (0.5, 2) in place of powers of ten."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:.4g}" if super().__call__(x, pos) else ""  # it leaves out labels that would be too dense

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(Plain(minor_thresholds=(2, 0.4)))
    axes.yaxis.set_minor_formatter(Plain(minor_thresholds=(2, 0.4)))


def curve_chart(curves: Curves, what: str, *, log: bool = False) -> str:
    """Return the chart of :func:`draw_curves` as SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    draw_curves(figure.subplots(), curves, what, log=log)
    return _svg(figure)


def layer_chart(lines: Mapping[str, Sequence[float]], what: str) -> str:
    """Return the chart of one quantity of several layers, in percent by epoch, as SVG.

    Up to :data:`FEW` layers have a line each, thinner ones over thicker ones, so that equal lines can all be seen. Of
    more layers the lines are grey, and their median has the colour.
    """
    import numpy
    from matplotlib.figure import Figure

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
    _set_epochs(axes, what, len(epochs))
    axes.set_ylabel("%")
    axes.set_ylim(0, 1.08 * max(map(max, lines.values())) or 1)  # a level line stands clear of the frame
    axes.legend(frameon=False, fontsize=9)
    return _svg(figure)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure, with its text as it is written; the suffix of the path gives the format."""
    _take_text_literally(figure)
    replace(path, figure.savefig)


def _svg(figure: Figure) -> str:
    """Return the figure as an ``<svg>`` element, the same for the same figure; its text stays text."""
    import matplotlib

    figure.patch.set_alpha(0)
    _take_text_literally(figure)
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sparsekern"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return text[text.index("<svg") :].replace('width="', 'data-width="', 1).replace('height="', 'data-height="', 1)


def _take_text_literally(figure: Figure) -> None:
    r"""Turn off formulas in ``$`` in a figure, and show control characters as escapes. Call it before saving.

    A file named ``$\frac{1}{$.npz`` would end the drawing with an error of the formula.
    """
    from matplotlib.text import Text

    for found in figure.findobj(Text):
        assert isinstance(found, Text)
        found.set_parse_math(False)
        found.set_text(printable(found.get_text()))


EMPTY, KEPT, DROPPED, GROWN = "#f4f4f1", "#1d3f5e", "#9db8cc", "#e07b39"
"""Colours of no block, a block since the start, a block at the start only, and a block grown since."""

LEVELS = 4
"""Shades from the emptiest to the fullest pixel, and mixtures of kept and grown blocks."""

BLANK = 2
"""The shade between the panels of a kernel."""


def panels(image: numpy.ndarray, kernel: tuple[int, ...] | None, blank: int) -> numpy.ndarray:
    """Arrange the columns ``(tap, channel)`` of an image ``(H, W)`` as one panel a tap, in the shape of the kernel.

    Args:
        image: of a layer's grid. That of a linear layer or a pointwise convolution is returned as it is.
        kernel: ``(kh, kw)``, ``(kw,)``, or None for a linear layer.
        blank: value of the gaps.
    """
    import numpy

    kh, kw = taps(kernel)
    if kh * kw == 1:
        return image
    tall, wide = image.shape[0], image.shape[1] // (kh * kw)
    by_tap = image.reshape(tall, kh, kw, wide).transpose(1, 0, 2, 3)  # (kh, H, kw, columns of a tap)
    gap = panel_gap(tall, wide)
    spaced = numpy.pad(by_tap, ((0, 0), (0, gap), (0, 0), (0, gap)), constant_values=blank)
    tall, wide = kh * (tall + gap), kw * (wide + gap)
    return spaced.reshape(tall, wide)[: tall - gap, : wide - gap]


def taps(kernel: tuple[int, ...] | None) -> tuple[int, int]:
    """Return rows and columns of a kernel of one or two dimensions; 1 and 1 for a linear layer."""
    rows, cols = (1, *(kernel or (1,)))[-2:]
    return rows, cols


def panel_gap(tall: int, wide: int) -> int:
    """Return the pixels between two panels of ``tall x wide`` pixels."""
    return max(1, max(tall, wide) // 12)


def shades(
    now: numpy.ndarray, kept: numpy.ndarray, start: numpy.ndarray, fullest: int, kernel: tuple[int, ...] | None
) -> numpy.ndarray:
    """Return the index into :func:`palette` of each pixel ``(H, W)``, with a kernel's taps as panels.

    Args:
        now, kept, start: ``(H, W)`` uint8, how full each pixel is: of the present blocks, of those of them that were
            there at the start, and of the blocks at the start.
        fullest: the largest ``now`` of all images that are to be compared.
        kernel: of a convolution.
    """
    import numpy

    now, kept = now.astype(int), kept.astype(int)
    level = -(-LEVELS * now // max(1, fullest))  # 1 or more where there is anything
    share = (LEVELS * kept + now // 2) // numpy.maximum(now, 1)
    shade = BLANK + 1 + (level - 1) * (LEVELS + 1) + share
    return panels(numpy.where(now > 0, shade, start > 0).astype(numpy.uint8), kernel, BLANK)


def palette(other: str = GROWN) -> numpy.ndarray:
    """Return the colours ``(n, 3)`` uint8: empty, dropped, blank, then by level and share of kept and other blocks."""
    import numpy
    from matplotlib.colors import to_rgb

    empty, kept, dropped, grown = (255 * numpy.array(to_rgb(colour)) for colour in (EMPTY, KEPT, DROPPED, other))
    share = numpy.linspace(0, 1, LEVELS + 1)[:, None]
    full = numpy.rint(grown + share * (kept - grown))
    level = numpy.linspace(0, 1, LEVELS + 1)[1:, None, None]
    mixed = (empty + level * (full - empty)).reshape(-1, 3)
    colours: numpy.ndarray = numpy.rint(numpy.vstack([empty, dropped, [255, 255, 255], mixed]))
    return colours.astype(numpy.uint8)


def png(shade: numpy.ndarray) -> str:
    """Return an image of :func:`shades` as a ``data:`` address."""
    from PIL import Image

    image = Image.frombytes("P", shade.shape[::-1], shade.tobytes())
    image.putpalette(palette().tobytes())
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
