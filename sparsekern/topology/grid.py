"""The grid of blocks that a weight matrix is cut into."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """A weight of ``out_features x in_features`` elements cut into blocks ``(bo, bi)``.

    The last block row and column may stick out of the matrix; that part is *phantom* and never counted.

    Args:
        out_features: rows of the matrix, 1 or more.
        in_features: columns of the matrix, 1 or more.
        block: rows and columns of a block, 1 or more each.

    Raises:
        ValueError: a size is below 1, or the grid has 2**31 cells or more (the index is int32).
    """

    out_features: int
    in_features: int
    block: tuple[int, int]

    def __post_init__(self) -> None:
        for name in ("out_features", "in_features"):
            size = getattr(self, name)
            if size < 1:
                raise ValueError(f"{name} is {size}; it must be 1 or more")
        if len(self.block) != 2 or min(self.block) < 1:
            raise ValueError(f"block_size is {self.block}; it must be an int or a pair (out, in), 1 or more each")
        if self.cells >= 2**31:
            raise ValueError(
                f"{self.out_features} x {self.in_features} in blocks of {self.block} are {self.cells} cells; "
                "the index is int32 and holds fewer than 2**31: use larger blocks"
            )

    @property
    def rows(self) -> int:
        """R, the number of block rows."""
        return -(-self.out_features // self.block[0])

    @property
    def cols(self) -> int:
        """C, the number of block columns."""
        return -(-self.in_features // self.block[1])

    @property
    def cells(self) -> int:
        """R * C, the number of places for a block."""
        return self.rows * self.cols

    @property
    def numel(self) -> int:
        """Elements of the dense matrix."""
        return self.out_features * self.in_features

    @property
    def has_edge(self) -> bool:
        """Whether some block sticks out of the matrix."""
        return bool(self.out_features % self.block[0] or self.in_features % self.block[1])

    def real_rows(self, row: Tensor) -> Tensor:
        """Return how many of its ``bo`` rows a block in block row ``row`` has inside the matrix; 0 for a free slot."""
        inside = (self.out_features - row * self.block[0]).clamp(max=self.block[0])
        return torch.where(row >= 0, inside, 0)

    def real_cols(self, col: Tensor) -> Tensor:
        """Return how many of its ``bi`` columns a block in block column ``col`` has inside the matrix; 0 if free."""
        inside = (self.in_features - col * self.block[1]).clamp(max=self.block[1])
        return torch.where(col >= 0, inside, 0)


def block_pair(block_size: int | tuple[int, int]) -> tuple[int, int]:
    """Return ``(out, in)`` from an int or a pair; :class:`Grid` checks that they are 1 or more.

    Raises:
        TypeError: neither an int nor a pair of ints.
    """
    pair = (
        (block_size, block_size)
        if isinstance(block_size, int)
        else tuple(block_size)
        if isinstance(block_size, (tuple, list))
        else (block_size,)
    )
    if len(pair) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) for side in pair):
        raise TypeError(f"block_size is {block_size!r}; it must be an int or a pair of ints (out, in)")
    return pair
