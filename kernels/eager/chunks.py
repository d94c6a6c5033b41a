"""Panels of tokens or image rows and chunks of blocks, which bound the scratch memory of the eager kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import pad

SCRATCH_BYTES = 16 * 2**20
"""Bytes that a kernel may hold in addition to its inputs and outputs. It needs enough for at least one token and one
block, and takes that much where it is more."""


def piece(total: int, bytes_each: int) -> int:
    """Return the number of tokens, or of blocks, to process at once, such that they fill at most half the scratch."""
    return max(1, min(total, SCRATCH_BYTES // 2 // max(1, bytes_each)))


def spans(total: int, step: int) -> Iterator[tuple[int, int]]:
    """Yield ``(start, stop)`` of pieces of at most ``step`` that cover ``range(total)``."""
    for start in range(0, total, step):
        yield start, min(start + step, total)


class Panel(NamedTuple):
    """Rows ``r0`` to ``r1`` of the images ``n0`` to ``n1``: whole images, or some rows of one."""

    n0: int
    n1: int
    r0: int
    r1: int


def panels(
    images: int, rows: int, bytes_per_row: int, bytes_per_panel: int, most: int | None = None
) -> Iterator[Panel]:
    """Yield panels that cover all rows of all images, such that what grows with them fills at most half the scratch.

    Args:
        images: number of images.
        rows: rows of one.
        bytes_per_row: bytes per row.
        bytes_per_panel: bytes per image, independent of how many of its rows are in the panel.
        most: maximum number of rows in a panel, even if more would fit; 0 counts as 1.
    """
    budget = SCRATCH_BYTES // 2
    at_once = max(1, (budget - bytes_per_panel) // max(1, bytes_per_row))
    together = max(1, budget // max(1, bytes_per_panel + rows * bytes_per_row))
    if most is not None:
        at_once, together = min(at_once, max(1, most)), min(together, max(1, most // max(1, rows)))
    if at_once < rows:
        for image in range(images):
            for r0, r1 in spans(rows, at_once):
                yield Panel(image, image + 1, r0, r1)
    else:
        for n0, n1 in spans(images, together):
            yield Panel(n0, n1, 0, rows)


def cut(x: Tensor, side: int) -> Tensor:
    """Cut the last axis ``(T, F)`` into blocks: ``(T, ceil(F / side), side)``, the last one filled up with zeros.

    A view when ``side`` divides ``F``, else a copy.
    """
    missing = -x.shape[-1] % side
    if missing:
        x = pad(x, (0, missing))
    blocks: Tensor = x.unflatten(-1, (-1, side))
    return blocks
