"""Text from elsewhere, such as names of tensors and files, made safe to print, to draw and to put into a page."""

from __future__ import annotations

import html
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OBEYED = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode categories of what is not for reading: controls, formats (the order of letters), halves of characters, line
and paragraph separators."""

LAYOUT = "\n\t"
"""The controls that text may hold."""


def printable(text: str) -> str:
    r"""Return the text with every character that is not for reading as its escape, such as ``\x1b``.

    A terminal obeys escape sequences: a name can clear the screen, fill the clipboard, or reverse what follows it. Half
    a character, as Python makes of a file name that is not UTF-8, cannot be written at all.
    """
    if text.isprintable():
        return text
    obeyed = {c for c in text if unicodedata.category(c) in OBEYED and c not in LAYOUT}
    return "".join(c.encode("unicode_escape").decode() if c in obeyed else c for c in text)


def escape(text: str) -> str:
    """Return the text for a page: printable, and without a meaning in HTML."""
    return html.escape(printable(text))


def draw_as_written(figure: Figure) -> None:
    r"""Let a figure draw all of its text as it is written: ``$`` begins no formula. Call it before saving.

    A file named ``$\frac{1}{$.npz`` would end the drawing with an error of the formula.
    """
    from matplotlib.text import Text

    for found in figure.findobj(Text):
        assert isinstance(found, Text)
        found.set_parse_math(False)
        found.set_text(printable(found.get_text()))
