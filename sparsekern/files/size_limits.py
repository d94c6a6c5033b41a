"""Limits on the memory that a file may ask for, checked against its headers before any is allocated.

A few hundred bytes can describe terabytes: compressed zeros, expanded tensors, sizes in metadata. Ordinary files need
at most a few times their own size.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsekern.errors import InputError
from sparsekern.topology.arguments import check_number

FACTOR = 16
"""Multiple of its own size that any file may ask for: images are stored in a quarter of their bytes as float32."""


class TooLarge(InputError):
    """A file asks for more than its limits allow."""


@dataclass(frozen=True)
class Limits:
    """Limits on what a file may ask for.

    Attributes:
        gib: memory in GiB; files larger than a sixteenth of it may ask for 16 times their own size.
        tensors: number of tensors.
        option: the user's name for ``gib``, for errors.

    Raises:
        TypeError, ValueError: ``gib`` or ``tensors`` is not a number above 0.
    """

    gib: float = 2.0
    tensors: int = 100_000
    option: str = "max_gib"

    def __post_init__(self) -> None:
        for name, value in ((self.option, self.gib), ("max_tensors", self.tensors)):
            check_number(name, value, "a number above 0", lambda number: number > 0)

    def check_bytes(self, source: object, wanted: int, file_bytes: int) -> None:
        """Check the memory that a file asks for.

        Args:
            source: name of the file, for the error.
            wanted: bytes of memory.
            file_bytes: size of the file.

        Raises:
            TooLarge: it asks for too much.
        """
        if wanted > max(self.gib * 2**30, FACTOR * file_bytes):
            raise TooLarge(
                f"{source} has {file_bytes} bytes and asks for {wanted / 2**30:.3g} GiB of memory, and {self.option} "
                f"is {self.gib:g}; if you trust the file, choose a larger {self.option}"
            )

    def check_tensors(self, source: object, count: int, about: bool = False) -> None:
        """Check the number of tensors in a file.

        Raises:
            TooLarge: there are too many.
        """
        if count > self.tensors:
            raise TooLarge(
                f"{source} holds {'about ' * about}{count} tensors, and max_tensors is {self.tensors}; if you "
                "trust the file, choose a larger max_tensors"
            )


DEFAULT = Limits()
