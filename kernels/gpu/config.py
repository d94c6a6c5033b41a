"""Configurations of kernels: tile sizes and scheduling, and the problem that they are chosen for.

A configuration is chosen by a :class:`Problem`: the kernel, the architecture, dtype and block, and the *magnitude* of
tokens and of blocks per row. Never by the number of blocks or where they are: a topology that moves must not recompile.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib import resources
from typing import Any, NamedTuple

import torch

NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


class Problem(NamedTuple):
    """What a configuration is chosen by, and the key of the tables."""

    kernel: str
    """A name in :data:`KINDS`."""
    arch: str
    """``sm_90`` and so on."""
    dtype: str
    """``fp16`` | ``bf16`` | ``fp32`` (tf32) | ``ieee`` (float32 without tensor cores)"""
    bo: int
    bi: int
    log2_tokens: int
    """T is at most ``2 ** log2_tokens``; pixels of a convolution are tokens."""
    log2_blocks: int
    """The mean number of blocks a block row (column for dx) is at most ``2 ** log2_blocks``."""

    @property
    def key(self) -> str:
        """The name in a table."""
        return f"{self.kernel} {self.dtype} {self.bo}x{self.bi} t{self.log2_tokens} n{self.log2_blocks}"

    @property
    def is_conv2d(self) -> bool:
        """Whether it is a kernel of the convolution."""
        return self.kernel.startswith("conv2d_")

    @property
    def takes_norms(self) -> bool:
        """Whether it reduces chosen blocks to norms, for which a program must hold whole ones."""
        return self.kernel.endswith("block_norms") and not self.kernel.endswith("all_block_norms")

    @property
    def itemsize(self) -> int:
        """Bytes of an element of the compute dtype."""
        return 2 if self.dtype in ("fp16", "bf16") else 4

    @property
    def summed(self) -> int:
        """IN: the side of a block that a product sums over."""
        return self.bo if self.kernel.endswith("dx") else self.bi

    @property
    def kept(self) -> int:
        """OUT: the side of a block along the output of a product."""
        return self.bi if self.kernel.endswith("dx") else self.bo


@dataclass(frozen=True)
class Multiply:
    """Of ``multiply_kernel``, ``multiply_tma_kernel`` and ``conv2d_multiply_kernel``."""

    tile_t: int
    tile_k: int
    group: int
    """Token tiles whose programs run next to each other."""
    warps: int
    stages: int
    tma: bool = False
    cut: int = 1
    """Programs that share a block row of the output: with few tokens there are too few rows to fill the device."""


@dataclass(frozen=True)
class FewTokens:
    """Of ``few_tokens_kernel``."""

    tile_n: int
    tile_k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Outer:
    """Of ``outer_kernel`` and ``conv2d_outer_kernel``."""

    tile_in: int
    tile_t: int
    warps: int
    stages: int
    waves: int = 2
    """Tokens are split until there are this many programs for each multiprocessor."""


@dataclass(frozen=True)
class Supertile:
    """Of ``supertile_kernel`` and ``conv2d_supertile_kernel``."""

    tile_out: int
    tile_in: int
    tile_t: int
    warps: int
    stages: int


Config = Multiply | FewTokens | Outer | Supertile


def well_formed(config: Config) -> bool:
    """Return whether the fields of a configuration that was read from a file are numbers a kernel can be built with."""
    fields = dict(vars(config))
    if not isinstance(fields.pop("tma", False), bool):
        return False
    if not all(type(n) is int and n > 0 for n in fields.values()):
        return False
    tiles = [n for name, n in fields.items() if name.startswith("tile") or name in ("warps", "cut")]
    return all(n & (n - 1) == 0 for n in tiles) and config.warps <= 16 and 2 <= config.stages <= 16


KINDS: dict[str, type[Config]] = {
    "fwd": Multiply,
    "dx": Multiply,
    "few_fwd": FewTokens,
    "few_dx": FewTokens,
    "dvalues": Outer,
    "block_norms": Outer,
    "all_block_norms": Supertile,
    "conv2d_fwd": Multiply,
    "conv2d_dx": Multiply,
    "conv2d_dvalues": Outer,
    "conv2d_block_norms": Outer,
    "conv2d_all_block_norms": Supertile,
}


def problem(
    kernel: str,
    arch: str,
    dtype: torch.dtype,
    precision: str,
    block: tuple[int, int],
    tokens: int,
    slots: int,
    rows: int,
) -> Problem:
    """Return the problem of a call; ``rows`` is the number of block rows (columns for dx)."""
    name = "ieee" if dtype == torch.float32 and precision == "ieee" else NAMES[dtype]
    return Problem(kernel, arch, name, *block, log2_ceil(tokens), log2_ceil(ceil_div(slots, max(1, rows))))


def ceil_div(number: int, divisor: int) -> int:
    """Return the quotient, rounded up. (That of Triton takes 3 us on the host.)"""
    return -(-number // divisor)


def log2_ceil(number: int) -> int:
    """Return the smallest ``n`` with ``2 ** n >= number``; 0 for 0."""
    return max(0, number - 1).bit_length()


@functools.cache
def package_data(name: str) -> Any:
    """Return a JSON file of the folder ``configs``, or None when there is no such file."""
    file = resources.files("sparsekern.kernels.gpu") / "configs" / name
    return json.loads(file.read_text()) if file.is_file() else None
