"""Text for people: names from elsewhere made safe to show, and numbers in words."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

OBEYED = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode categories that are not for reading: controls, formats (such as the direction of writing), surrogates, line
and paragraph separators."""

LAYOUT = "\n\t"
"""Control characters that text may contain."""


def printable(text: str) -> str:
    r"""Return the text with every character that is not for reading as its escape, such as ``\x1b``.

    A terminal obeys escape sequences: a name can clear the screen, fill the clipboard, or reverse the text behind it. A
    surrogate, which Python makes of a file name that is not UTF-8, cannot be encoded at all.
    """
    if text.isprintable():
        return text
    obeyed = {c for c in text if unicodedata.category(c) in OBEYED and c not in LAYOUT}
    return "".join(c.encode("unicode_escape").decode() if c in obeyed else c for c in text)


def count(number: int, thing: str) -> str:
    """Return a number of things, such as "1 thread" or "2 threads"."""
    return f"{number:,} {thing}{'s' * (number != 1)}"


def percent(sparsity: float | Mapping[str, float]) -> str:
    """Return a sparsity such as "90 %", or "mlp 90 %, attention 70 %" where kinds of layers have one each."""
    if isinstance(sparsity, Mapping):
        return ", ".join(f"{kind} {100 * number:.4g} %" for kind, number in sparsity.items())
    return f"{100 * sparsity:.4g} %"


def mean_and_deviation(numbers: dict[str, Any], scale: float, digits: int) -> str:
    """Return the ``mean`` over seeds and, if there is one, the ``standard_deviation``, such as "97.89 ± 0.21"."""
    deviation = numbers["standard_deviation"]
    spread = "" if deviation is None else f" ± {scale * deviation:.{digits}f}"
    return f"{scale * numbers['mean']:.{digits}f}{spread}"


def aligned(notes: Sequence[tuple[str, str]]) -> str:
    """Return notes on a line each, behind their topics."""
    width = max(len(topic) for topic, _ in notes) + 2
    return "\n".join(f"{topic:<{width}}{text}" for topic, text in notes)
