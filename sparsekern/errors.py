"""The error of everything that a caller can mend."""

from __future__ import annotations


class InputError(ValueError):
    """An argument, an option or a file that the caller can mend; the text says how.

    Every :class:`ValueError` of this package is one. A plain :class:`ValueError` out of it comes from another library
    and is a defect here: the command shows its traceback, where an ``InputError`` becomes one line and exit code 2.

    Args:
        message: names the argument, its value, the rule and the way out.
        parameter: name of the argument, where it is one that is at fault.
    """

    def __init__(self, message: str, *, parameter: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter
