"""Tables of the rows of ``sparsekern bench``, the losing cells marked, and break-even sparsities."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

from sparsekern.lab.bench.run import DENSE, FORWARD, Row
from sparsekern.lab.report.charts import COLOURS, save_figure
from sparsekern.lab.report.tables import count

SLOWER = "slower"
"""Mark of a cell that is slower than dense."""

Group = tuple[str, str, int]
"""Layer, dtype and threads."""


def groups(rows: Iterable[Row]) -> dict[Group, list[Row]]:
    """Return the rows by layer, dtype and threads, in their order."""
    found: dict[Group, list[Row]] = {}
    for row in rows:
        found.setdefault((row["layer"], row["dtype"], row["threads"]), []).append(row)
    return found


def group_title(group: Group) -> str:
    """Return a title of a table or picture."""
    layer, dtype, threads = group
    return f"{layer}, {dtype}, {count(threads, 'thread')}"


def contestants(rows: Iterable[Row]) -> list[str]:
    """Return the names of the contestants but for the dense layer, in their order."""
    return [name for name in dict.fromkeys(row["contestant"] for row in rows) if name != DENSE]


def curve(rows: Iterable[Row], which: str, contestant: str) -> list[tuple[float, float]]:
    """Return ``(sparsity, times as fast as dense)`` of a contestant, by sparsity."""
    return sorted((r["sparsity"], r["vs_dense"]) for r in rows if (r["pass"], r["contestant"]) == (which, contestant))


def break_even(points: list[tuple[float, float]]) -> tuple[float, str]:
    """Return the sparsity from which on a contestant is faster than dense, and its kind.

    It is ``"between"`` two measured ones, ``"below"`` the lowest (faster at all), or ``"above"`` the highest (at none).
    Times fall about linearly with sparsity, so the time as a fraction of dense is interpolated linearly between the
    highest sparsity at which the contestant is slower and the next.

    Args:
        points: ``(sparsity, times as fast as dense)``, by sparsity.
    """
    if points[-1][1] < 1:
        return points[-1][0], "above"
    for (low, slow), (high, fast) in reversed(list(pairwise(points))):
        if slow < 1:
            return low + (high - low) * (1 / slow - 1) / (1 / slow - 1 / fast), "between"
    return points[0][0], "below"


def break_evens(rows: list[Row]) -> Iterator[Row]:
    """Yield the break-even sparsity of each contestant in each group and pass, see :func:`break_even`."""
    for (layer, dtype, threads), mine in groups(rows).items():
        for which in dict.fromkeys(row["pass"] for row in mine):
            for name in contestants(mine):
                if points := curve(mine, which, name):
                    sparsity, kind = break_even(points)
                    found = {"layer": layer, "dtype": dtype, "threads": threads, "which": which, "contestant": name}
                    yield found | {"sparsity": sparsity, "kind": kind}


def table_cells(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Return the heading and the lines of a group's table: a line for each pass and sparsity, then the break-even."""
    names = contestants(rows)
    heading = ["pass", "sparsity", DENSE, *names]
    by_place = {(row["pass"], row["sparsity"], row["contestant"]): row for row in rows}
    lines = []
    for which in dict.fromkeys(row["pass"] for row in rows):
        for sparsity in dict.fromkeys(row["sparsity"] for row in rows if row["pass"] == which):
            found = [by_place.get((which, sparsity, name)) for name in (DENSE, *names)]
            lines.append([which, f"{sparsity:.4g}", *(_cell(row) for row in found)])
        evens = {
            even["contestant"]: f"{even['kind'].replace('between', '')} {even['sparsity']:.0%}".strip()
            for even in break_evens(rows)
            if even["which"] == which
        }
        lines.append([which, "break-even", "", *(evens.get(name, "") for name in names)])
    return heading, lines


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    times = f"{milliseconds(row['ms'])} ms ({milliseconds(row['p25'])}-{milliseconds(row['p75'])})"
    return times if row["contestant"] == DENSE else f"{ratio(row['vs_dense'])}\n{times}"


def model_cells(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Return the heading and the lines of a model's table: a line for each layer and sparsity, then the sums."""
    names = contestants(rows)
    lines = []
    sparsities = list(dict.fromkeys(row["sparsity"] for row in rows))
    for layer in dict.fromkeys(row["layer"] for row in rows):
        mine = {(row["sparsity"], row["contestant"]): row for row in rows if row["layer"] == layer}
        for sparsity in sparsities:
            cells = [mine.get((sparsity, name)) for name in names]
            dense = milliseconds(mine[sparsity, DENSE]["ms"])
            lines.append(
                [layer, f"{sparsity:.4g}", dense, *("-" if r is None else ratio(r["vs_dense"]) for r in cells)]
            )
    for sparsity in sparsities:
        sums = {name: _sum(rows, sparsity, name) for name in (DENSE, *names)}
        ratios = [ratio(sums[DENSE] / sums[name]) for name in names]
        lines.append(["all layers", f"{sparsity:.4g}", milliseconds(sums[DENSE]), *ratios])
    return ["layer", "sparsity", "dense ms", *names], lines


def _sum(rows: list[Row], sparsity: float, name: str) -> float:
    """Return the milliseconds of all layers, each as often as it occurs: dense where the contestant has none."""
    mine = [row for row in rows if row["sparsity"] == sparsity]
    times: dict[str, float] = {r["layer"]: r["ms"] * r["count"] for r in mine if r["contestant"] == DENSE}
    times |= {r["layer"]: r["ms"] * r["count"] for r in mine if r["contestant"] == name}
    return sum(times.values())


def ratio(number: float) -> str:
    """Return a speed-up as text, below 1 with the mark; what is below 1 is never rounded up to it."""
    if number < 1:
        return f"{min(number, 0.99):.2f}x {SLOWER}"
    return f"{number:.2f}x" if number < 9.995 else f"{number:.1f}x"


def milliseconds(ms: float) -> str:
    """Return a time as text, three digits."""
    return f"{ms:.0f}" if ms >= 99.95 else f"{ms:.3g}"


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
