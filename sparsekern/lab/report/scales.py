"""Horizontal bars of HTML, for pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sparsekern.lab.report.text import escape

PARTS = ("#0b6e99", "#5fa8c7", "#a9d0e0", "#1d3f5e")
"""Colours of the parts of a stacked bar, in turn."""


def bars(entries: Sequence[tuple[str, float, str]], most: float) -> str:
    """Return bars below each other.

    Args:
        entries: ``(class, value, text)``; the class gives the colour.
        most: the value of a bar of full length.
    """
    return "".join(
        f'<div class="bar {kind}"><div><i style="width:{_percent(value, most)}%"></i></div>'
        f"<span>{escape(text)}</span></div>"
        for kind, value, text in entries
    )


def stack(parts: Mapping[str, float], whole: float) -> str:
    """Return a bar made of parts, above one of the other network's whole; both in MiB."""
    most = max(whole, sum(parts.values()))
    pieces = "".join(
        f'<i style="width:{_percent(size, most)}%;background:{PARTS[i % len(PARTS)]}"></i>'
        for i, size in enumerate(parts.values())
    )
    names = "".join(
        f'<span><i style="background:{PARTS[i % len(PARTS)]}"></i>{escape(name)} {size:.3g} MiB</span>'
        for i, (name, size) in enumerate(parts.items())
    )
    return (
        f'<div class="stack"><b>sparse</b><div>{pieces}</div><span>{sum(parts.values()):.3g} MiB</span>'
        f'<b>dense</b><div><i class="whole" style="width:{_percent(whole, most)}%"></i></div>'
        f'<span>{whole:.3g} MiB</span></div><p class="legend">{names}</p>'
    )


def _percent(value: float, most: float) -> str:
    return f"{100 * value / most if most else 0:.2f}"
