"""The rows of the table of :mod:`bench.gpu_code`: which kernels are compiled, and for what."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from typing import NamedTuple

from sparsekern.kernels.gpu import roofline

ARCHS = ("sm_80", "sm_90", "sm_100")
CONSUMER = ("sm_86", "sm_89", "sm_120")
"""Architectures with 99 KiB of shared memory, whose tensor cores are those of sm_80: a row of each kernel is enough."""
SQUARES = ((16, 16), (32, 32), (64, 64), (128, 128))
RECTANGLES = ((16, 64), (64, 16), (32, 128), (128, 32))
DTYPES = ("bf16", "fp16", "fp32", "ieee")
LINEAR = ("fwd", "dx", "dvalues", "few_fwd", "few_dx", "block_norms", "all_block_norms")
CONV2D = ("conv2d_fwd", "conv2d_dx", "conv2d_dvalues", "conv2d_all_block_norms")
IEEE = ("fwd", "dx", "dvalues", "conv2d_fwd", "conv2d_dx", "conv2d_dvalues")
"""Kernels that are compiled for float32 without tensor cores, too."""
ON_CONSUMER = ("fwd", "dvalues", "conv2d_fwd")
"""Kernels that are compiled for those, in bfloat16."""
STREAMS = ("sum_splits", "projection", "conv2d_projection", "conv2d_lists")
"""Kernels without a product."""


class Case(NamedTuple):
    """A row of the table: which kernel is compiled for what."""

    arch: str
    kernel: str
    """A kernel of :data:`LINEAR`, :data:`CONV2D` or :data:`STREAMS`, ``fwd_tma`` or ``dx_tma``."""
    dtype: str
    """``bf16`` | ``fp16`` | ``fp32`` (tf32) | ``ieee`` (float32 without tensor cores)"""
    bo: int
    bi: int

    @property
    def key(self) -> str:
        """The name of the row."""
        return f"{self.arch} {self.kernel} {self.dtype} {self.bo}x{self.bi}"


def cases(patterns: list[str]) -> list[Case]:
    """Return the rows whose names match one of these, such as ``sm_90 fwd * 64x64``; all for none.

    Raises:
        ValueError: a pattern matches nothing.
    """
    every = list(_all())
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(case.key, pattern) for case in every):
            raise ValueError(f"no row is called {pattern!r}; one is {every[0].key!r}")
    return [case for case in every if not patterns or any(fnmatch.fnmatchcase(case.key, p) for p in patterns)]


def sample(patterns: list[str]) -> list[Case]:
    """Return one of :func:`cases` for each kernel, width of numbers and architecture; blocks and dtypes take turns.

    For a convolution all dtypes take turns: it shares its loops with the linear layer. So they do where there is no
    product.
    """
    groups: dict[tuple[str, ...], list[Case]] = {}
    for case in cases(patterns):
        groups.setdefault(sampled_by(case), []).append(case)
    kernels = list(dict.fromkeys(kernel for _, kernel, *_ in groups))
    chosen = []
    for number, ((arch, kernel, *_), group) in enumerate(groups.items()):
        dtypes = list(dict.fromkeys(case.dtype for case in group))
        dtype = dtypes[((*ARCHS, *CONSUMER).index(arch) + kernels.index(kernel)) % len(dtypes)]
        rows = [case for case in group if case.dtype == dtype]
        chosen.append(rows[_turn(number, len(rows))])
    return chosen


def sampled_by(case: Case) -> tuple[str, ...]:
    """Return what :func:`sample` has one row for: bfloat16 and float16 are compiled alike."""
    if case.kernel.startswith("conv2d_") or case.kernel in STREAMS:
        return case[:2]
    return (*case[:2], "half" if case.dtype in ("bf16", "fp16") else case.dtype)


def _turn(number: int, rows: int) -> int:
    squares = len(SQUARES)  # a rectangle is compiled like a square
    return number % min(squares, rows) if rows <= 2 * squares else number * (squares + 1) % rows


def _all() -> Iterator[Case]:
    for arch in ARCHS:
        for kernel in (*LINEAR, *CONV2D):
            blocks = SQUARES if kernel in CONV2D else (*SQUARES, *RECTANGLES)
            for dtype in DTYPES:
                if dtype != "ieee" or kernel in IEEE:
                    yield from (Case(arch, kernel, dtype, *block) for block in blocks)
        for dtype in ("bf16", "fp16", "fp32"):
            for kernel in ("fwd_tma", "dx_tma") if roofline.device(arch)["tma"] else ():
                yield from (Case(arch, kernel, dtype, side, side) for side in (64, 128))
            for kernel in ("sum_splits", "projection"):
                yield from (Case(arch, kernel, dtype, *block) for block in SQUARES)
        for dtype in ("bf16", "fp16", "fp32"):
            yield from (Case(arch, "conv2d_projection", dtype, *block) for block in SQUARES)
        yield Case(arch, "conv2d_lists", "bf16", *SQUARES[0])  # of integers only
    for arch in CONSUMER:
        for kernel in ON_CONSUMER:
            yield Case(arch, kernel, "bf16", *SQUARES[-1])  # the largest: it must fit
