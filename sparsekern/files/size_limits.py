"""Limits on what a file may ask for, checked against its headers before memory is allocated.

A few hundred bytes can describe terabytes: compressed zeros, expanded tensors, sizes in metadata. Files that people
exchange seldom hold more than a few times their own size.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsekern.errors import InputError
from sparsekern.topology.arguments import check_number

FACTOR = 16
"""Times its own size that any file may ask for: images are packed to a quarter, and become float32."""


class TooLarge(InputError):
    """A file asks for more than its limits allow."""


@dataclass(frozen=True)
class Limits:
    """What a file may ask for.

    Attributes:
        gib: GiB of memory; a file of more than a sixteenth of that may ask for 16 times its own size.
        tensors: number of tensors.
        option: what a user calls ``gib``, for errors.

    Raises:
        TypeError, ValueError: ``gib`` or ``tensors`` is not a number above 0.
    """

    gib: float = 2.0
    tensors: int = 100_000
    option: str = "max_gib"

    def __post_init__(self) -> None:
        for name, value in ((self.option, self.gib), ("max_tensors", self.tensors)):
            check_number(name, value, "a number above 0")
            if not value > 0:
                raise InputError(f"{name} is {value}; it must be a number above 0", parameter=name)

    def check_bytes(self, source: object, wanted: int, file_bytes: int) -> None:
        """Check the memory that a file asks for.

        Args:
            source: names the file in an error.
            wanted: bytes.
            file_bytes: size of the file.

        Raises:
            TooLarge: it is too much.
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
