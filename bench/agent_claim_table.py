"""What the trainings of ``agent_claim`` show: what each took to reach an accuracy, as a table and a picture."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

AXES = {"epoch": "epochs", "flops": "FLOPs", "seconds": "seconds"}
TARGETS = (0.80, 0.82, 0.84, 0.85, 0.86, 0.87, 0.875, 0.88, 0.885, 0.89)


def reached(points: Sequence[dict[str, float]], target: float) -> dict[str, float] | None:
    """Return the point where an accuracy was first seen, or None."""
    return next((point for point in points if point["accuracy"] >= target), None)


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """Return Markdown: by sparsity, the mean over seeds of what was needed for each accuracy, and how it ended.

    An accuracy that not all seeds of a contestant reached is a dash; one that nobody reached is left out. Means of
    seconds are over the trainings that were timed; a dash if none was.
    """
    parts = []
    for sparsity in sorted({row["sparsity"] for row in rows}):
        mine = [row for row in rows if row["sparsity"] == sparsity]
        names = list(dict.fromkeys(row["contestant"] for row in mine))
        for axis, title in AXES.items():
            parts += [f"{100 * sparsity:g} % sparse: {title} to reach an accuracy, mean over seeds", ""]
            table = {name: _needed(mine, name, axis) for name in names}
            targets = [t for i, t in enumerate(TARGETS) if any(table[name][i] is not None for name in names)]
            parts += _markdown(
                ["", *(f"{100 * target:g} %" for target in targets)],
                [[name, *(_number(table[name][TARGETS.index(target)], axis) for target in targets)] for name in names],
            )
        parts += [f"{100 * sparsity:g} % sparse: at the end, mean and standard deviation over seeds", ""]
        parts += _markdown(
            ["", "seeds", "accuracy", "best seen", "FLOPs", "seconds", "c", "variance ratio"],
            [[name, *_end([row["points"] for row in mine if row["contestant"] == name])] for name in names],
        )
    return "\n".join(parts)


def _needed(rows: Iterable[dict[str, Any]], name: str, axis: str) -> list[float | None]:
    curves = [row["points"] for row in rows if row["contestant"] == name]
    found = []
    for target in TARGETS:
        points = [reached(curve, target) for curve in curves]
        found.append(None if None in points else _mean([point for point in points if point is not None], axis))
    return found


def _mean(points: Iterable[dict[str, float]], axis: str) -> float | None:
    """Return the mean of what the points hold on an axis, None if none holds any: see ``--untimed``."""
    values = [point[axis] for point in points if axis in point]
    return statistics.fmean(values) if values else None


def _number(value: float | None, axis: str) -> str:
    if value is None:
        return "-"
    return f"{value / 1e9:.3g} G" if axis == "flops" else f"{value:.3g}"


def _end(curves: Sequence[Sequence[dict[str, float]]]) -> list[str]:
    last = [points[-1] for points in curves]
    accuracies = [100 * point["accuracy"] for point in last]
    spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
    best = statistics.fmean(100 * max(point["accuracy"] for point in points) for points in curves)
    cells = [str(len(curves)), f"{statistics.fmean(accuracies):.2f} ± {spread:.2f} %", f"{best:.2f} %"]
    cells += [_number(_mean(last, axis), axis) for axis in ("flops", "seconds")]
    for key in ("c", "variance_ratio"):
        values = [point[key] for points in curves for point in points[len(points) // 2 :] if key in point]
        cells.append(f"{statistics.fmean(values):.3g}" if values else "")
    return cells


def _markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return [*("| " + " | ".join(line) + " |" for line in lines), ""]


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw accuracy over each axis, a row a sparsity; lines are means over seeds."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    sparsities = sorted({row["sparsity"] for row in rows})
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    figure, axes = plt.subplots(len(sparsities), len(AXES), figsize=(13, 4 * len(sparsities)), squeeze=False)
    for line, sparsity in zip(axes, sparsities, strict=True):
        for place, (axis, title) in zip(line, AXES.items(), strict=True):
            best = 0.0
            for number, name in enumerate(names):
                mine = [r["points"] for r in rows if r["sparsity"] == sparsity and r["contestant"] == name]
                curves = [points for points in mine if points and axis in points[0]]
                if not curves:
                    continue
                steps = list(zip(*curves, strict=True))
                x = [statistics.fmean(point[axis] for point in step) for step in steps]
                y = [100 * statistics.fmean(point["accuracy"] for point in step) for step in steps]
                best = max(best, *y)
                place.plot(x, y, color=f"C{number}", lw=1.2, label=name, ls="-" if "agent" in name else "--")
            place.set_ylim(best - 12, best + 1)
            place.set_xlabel(title)
            place.set_ylabel("test accuracy, %")
            place.set_title(f"{100 * sparsity:g} % sparse", fontsize=10)
            place.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
