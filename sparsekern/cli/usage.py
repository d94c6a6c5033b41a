"""Errors of usage as one plain sentence, where typer would draw a box."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any, cast

import typer
from typer.core import TyperGroup

from sparsekern.lab.report.text import printable

USAGE = cast(type[Exception], typer.BadParameter.__mro__[1])
"""The parent of all errors of usage, which typer does not export."""


class PlainErrors(TyperGroup):
    """A group of commands that says in one line what is wrong with an option, and where the help is."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command; without a command show the help."""
        arguments = list(sys.argv[1:] if args is None else args) or ["--help"]
        try:
            code = super().main(arguments, prog_name, complete_var, False, windows_expand_args, **extra)
        except USAGE as error:
            if not standalone_mode:
                raise
            print(printable(f"error: {sentence(error, arguments)}"), file=sys.stderr)
            sys.exit(2)
        if standalone_mode:
            sys.exit(code if isinstance(code, int) else 0)
        return code


CHOICE = re.compile("'([^']*)' is not one of (.*)")
"""What typer says of a text that is none of those there are: the text, and those in quotes."""

KINDS = {"integer": "a whole number", "number": "a number", "float": "a number"}
"""What the words of typer, older and newer, are called here."""


def sentence(error: Any, arguments: Sequence[str] = ()) -> str:
    """Return what an error of usage says, in one line, and the command that shows the help.

    Args:
        error: typer's.
        arguments: of the command line: typer does not say what a value of the wrong kind was.
    """
    text = " ".join(error.format_message().split()).rstrip(".")
    kind = next((kind for word, kind in KINDS.items() if word in text), None)
    names = error.param.opts if getattr(error, "param", None) is not None else []
    given = [value for name in names for value in _values(name, arguments)]
    if names and (choice := CHOICE.search(text)) is not None:
        kind, given = "one of " + choice[2].replace("'", ""), [choice[1]]
    if kind is not None and given:
        text = f"{names[0]} is {given[0]!r}; it must be {kind}"
    text = text.replace(". Choose from:", ", which is one of")
    command = "sparsekern" if error.ctx is None else error.ctx.command_path
    text = text.replace(". Did you mean", "; did you mean")
    text += "" if text.endswith("?") else ";"
    return f"{text[:1].lower()}{text[1:]} {command} --help shows what there is"


def _values(option: str, arguments: Sequence[str]) -> list[str]:
    """Return what was given for an option, the last first: that is the one that counts."""
    after = [arguments[i + 1] for i, text in enumerate(arguments[:-1]) if text == option]
    joined = [text.partition("=")[2] for text in arguments if text.startswith(f"{option}=")]
    return [*reversed(joined), *reversed(after)]
