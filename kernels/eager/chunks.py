"""How the eager kernels stay within a bounded scratch: tokens in panels, blocks in chunks."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.nn.functional import pad

SCRATCH_BYTES = 16 * 2**20
"""What a kernel may hold beside its inputs and outputs. One token with one block is the least it can work with,
so a layer whose single token needs more gets that much; see :func:`token_panel`."""


def token_panel(tokens: int, bytes_per_token: int) -> int:
    """Return how many tokens to take at once, so that what grows with them fills at most half the scratch."""
    return max(1, min(tokens, SCRATCH_BYTES // 2 // max(1, bytes_per_token)))


def block_chunk(blocks: int, bytes_per_block: int) -> int:
    """Return how many blocks to take at once, so that what grows with them fills at most half the scratch."""
    return max(1, min(blocks, SCRATCH_BYTES // 2 // max(1, bytes_per_block)))


def spans(total: int, step: int) -> Iterator[tuple[int, int]]:
    """Yield ``(start, stop)`` of pieces of at most ``step`` that cover ``range(total)``."""
    for start in range(0, total, step):
        yield start, min(start + step, total)


def cut(x: Tensor, side: int) -> Tensor:
    """Cut the last axis ``(T, F)`` into blocks: ``(T, ceil(F / side), side)``, the last one filled up with zeros.

    A view when ``side`` divides ``F``, else a copy.
    """
    missing = -x.shape[-1] % side
    if missing:
        x = pad(x, (0, missing))
    blocks: Tensor = x.unflatten(-1, (-1, side))
    return blocks
