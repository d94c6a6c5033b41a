"""Pictures of a training. Draws what it is given, and touches no global state of matplotlib."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sparsekern.files.atomic_files import replace
from sparsekern.lab.report.blocks import DROPPED, EMPTY, GROWN, KEPT, panel_gap, panels
from sparsekern.lab.report.text import draw_as_written

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0b6e99", "#c4570c", "#5b8c2a", "#7a4fa3", "#b8860b", "#b03060", "#2a9d8f", "#444444")
"""One a curve; the first four told apart also without colour vision, all by their labels."""

TITLE_WIDTH = 36
"""Letters that fit above a picture of blocks; a longer title takes two lines."""


@dataclass(frozen=True)
class Curves:
    """One network's curves: ``by_seed[i][e]`` is its number for seed i after epoch e + 1."""

    label: str
    by_seed: Sequence[Sequence[float]]


@dataclass(frozen=True)
class BlockMap:
    """Where the blocks of a layer are, ``side`` features wide: keys ``row * cols + col`` on a ``rows x cols`` grid.

    Of a convolution ``kernel`` is ``(kh, kw)``, or ``(kw,)`` in one dimension, and the columns are in (tap, channel)
    order.
    """

    layer: str
    side: int
    rows: int
    cols: int
    start: Sequence[int]
    end: Sequence[int]
    kernel: tuple[int, ...] | None = None

    @property
    def taps(self) -> tuple[int, int]:
        """Rows and columns of the kernel; those of a linear layer are 1 and 1."""
        rows, cols = (1, *(self.kernel or (1,)))[-2:]
        return rows, cols


def draw_training(
    path: Path, *, title: str, subtitle: str, accuracy: Sequence[Curves], loss: Sequence[Curves], block_map: BlockMap
) -> None:
    """Write a picture of a training: accuracy, loss, and the blocks of a layer at the start and at the end.

    Args:
        path: its suffix gives the format, such as ``.png``.
        title, subtitle: what was trained, and what came out.
        accuracy: in percent.
        loss: on the training set; drawn on a logarithmic scale.
        block_map: the layer to show.
    """
    from matplotlib.figure import Figure

    height = 4.9 if block_map.taps == (1, 1) else 5.7  # the labels of a kernel take two lines
    figure = Figure(figsize=(16, height), dpi=110, layout="constrained")
    figure.suptitle(f"{title}\n{subtitle}", fontsize=13)
    left, middle, before, after = figure.subplots(1, 4, width_ratios=(1.15, 1.15, 1, 1))
    draw_curves(left, accuracy, "test accuracy (%)")
    draw_curves(middle, loss, "training loss")
    if max(len(curve) for network in loss for curve in network.by_seed) > 1:
        scale_by_factors(middle)
    _draw_blocks(before, block_map, at_start=True)
    _draw_blocks(after, block_map, at_start=False)
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure, its text drawn as it is written; the suffix of the path gives the format."""
    draw_as_written(figure)
    replace(path, figure.savefig)


def scale_by_factors(axes: Axes) -> None:
    """Make the vertical scale logarithmic, with plain numbers (0.5, 2) in place of powers of ten."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:.4g}" if super().__call__(x, pos) else ""  # it leaves out what would be too dense

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(Plain(minor_thresholds=(2, 0.4)))
    axes.yaxis.set_minor_formatter(Plain(minor_thresholds=(2, 0.4)))


def draw_curves(axes: Axes, curves: Sequence[Curves], what: str) -> None:
    """Draw the mean over seeds, a band from the lowest to the highest, and the names in the colours of the lines.

    Seeds may differ in length, as in a run that is not finished: a later epoch is the mean of fewer.
    """
    import numpy
    from matplotlib.ticker import MaxNLocator

    for colour, curve in zip(COLOURS, curves, strict=False):
        length = max(len(seed) for seed in curve.by_seed)
        seeds = numpy.ma.masked_invalid([[*seed, *[numpy.nan] * (length - len(seed))] for seed in curve.by_seed])
        epochs = numpy.arange(1, seeds.shape[1] + 1)
        axes.fill_between(epochs, seeds.min(0), seeds.max(0), color=colour, alpha=0.2, linewidth=0)
        axes.plot(epochs, seeds.mean(0), color=colour, linewidth=2, label=curve.label, marker="." * (len(epochs) == 1))
    count = max(len(curve.by_seed) for curve in curves)
    axes.set_title(what if count == 1 else f"{what}: mean and range of {count} seeds", fontsize=11)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    longest = max(len(curve) for network in curves for curve in network.by_seed)
    axes.set_xlim(0.5, longest + 0.5)
    axes.grid(alpha=0.25)
    axes.legend(loc="best", labelcolor="linecolor", frameon=False, fontsize=11)


def _draw_blocks(axes: Axes, block_map: BlockMap, *, at_start: bool) -> None:
    """Draw one cell a block: those at both times in one colour, those only at this time in another."""
    import numpy
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    start, end = set(block_map.start), set(block_map.end)
    shown, both = (start if at_start else end), start & end
    only, name = (DROPPED, "dropped later") if at_start else (GROWN, "grown since")
    cells = numpy.zeros(block_map.rows * block_map.cols)
    cells[sorted(shown)] = 2
    cells[sorted(both)] = 1
    colours = ListedColormap([EMPTY, KEPT, only, "white"])
    image = panels(cells.reshape(block_map.rows, block_map.cols), block_map.kernel, blank=3)
    axes.imshow(image, cmap=colours, vmin=0, vmax=3, interpolation="nearest")
    share = f"{len(shown)} of {cells.size} blocks, {100 * len(shown) / cells.size:.3g} %"
    layer = textwrap.fill(f"layer {block_map.layer} at the {'start' if at_start else 'end'}", TITLE_WIDTH)
    axes.set_title(f"{layer}\n{share}", fontsize=11)
    _label_blocks(axes, block_map)
    entries = [Patch(color=KEPT, label=f"{'stays' if at_start else 'kept from the start'} ({len(both)})")]
    if shown - both:
        entries.append(Patch(color=only, label=f"{name} ({len(shown - both)})"))
    axes.legend(
        handles=entries,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.14 if block_map.taps == (1, 1) else -0.2),
        ncols=2,
        frameon=False,
        handlelength=1,
    )


def _label_blocks(axes: Axes, block_map: BlockMap) -> None:
    """Say what rows and columns are: of blocks, or of the taps of a kernel."""
    from matplotlib.ticker import MaxNLocator

    unit = "features" if block_map.kernel is None else "channels"
    if block_map.taps == (1, 1):
        axes.set_xlabel(f"input block (of {block_map.side} {unit})")
        axes.set_ylabel("output block")
        for axis, blocks, others in (
            (axes.xaxis, block_map.cols, block_map.rows),
            (axes.yaxis, block_map.rows, block_map.cols),
        ):
            # A narrow side has room for fewer numbers; a single row has a single tick.
            bins = max(1, min(9, round(12 * blocks / others)))
            axis.set_major_locator(MaxNLocator(bins, integer=True, min_n_ticks=1))
        return
    kh, kw = block_map.taps
    gap = panel_gap(block_map.rows, block_map.cols // (kh * kw))
    tall, wide = block_map.rows + gap, block_map.cols // (kh * kw) + gap
    axes.set_xticks([i * wide + (wide - gap - 1) / 2 for i in range(kw)], [str(i) for i in range(kw)])
    axes.set_yticks([i * tall + (tall - gap - 1) / 2 for i in range(kh)], [str(i) for i in range(kh)])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(
        f"column of the {kh} x {kw} kernel; in each of its {kh * kw} panels,\n"
        f"left to right: input block (of {block_map.side} {unit})"
    )
    axes.set_ylabel("row of the kernel; in each panel,\ntop to bottom: output block")
