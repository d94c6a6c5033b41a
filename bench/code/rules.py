"""What compiled kernels must be, and what it means that one got worse. The rows are those of :mod:`bench.gpu_code`.

The requirements hold with any version of Triton; the numbers of the committed table with the version that made it.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]

CLASSES = ("", "mma.sync", "wgmma", "tcgen05")
"""Kinds of matrix instructions, weakest first: none, of a warp, of four warps, of Blackwell's tensor memory."""

PRODUCT_KERNELS = ("fwd", "dx", "fwd_tma", "dx_tma", "dvalues", "block_norms", "all_block_norms")
TRANSPOSED_TF32 = ("dvalues", "block_norms", "all_block_norms")
"""Kernels that sum over tokens, along which neither operand is contiguous: wgmma and tcgen05 read no tf32 so."""


def requirements(case: str, row: Row) -> list[str]:
    """Return what a row must be and is not."""
    arch, kernel, dtype, _ = case.split()
    missing = []
    if row["spills"]:
        missing.append(f"it spills {row['spills']} bytes")
    if kernel in ("sum_splits", "projection"):
        return missing  # they stream: no product, no pipeline

    wanted = matrix_class(arch, kernel, dtype, row["config"])
    if row["instruction"] != wanted:
        missing.append(f"its products are {row['instruction'] or 'scalar'}, not {wanted or 'scalar'}")
    width = "tma" if kernel.endswith("_tma") else "4" if copies_transpose(kernel, dtype, wanted) else "16"
    if set(row["copies"]) != {width}:
        missing.append(f"its copies are {', '.join(row['copies']) or 'not asynchronous'}, not {width}")
    stages = row["config"]["stages"]
    # mma.sync multiplies registers: the tile that is in use needs no buffer any more.
    buffers = stages if wanted in ("wgmma", "tcgen05") else stages - 1
    if row["buffers"] != buffers:
        missing.append(f"it has {row['buffers']} buffers, not {buffers}, in {stages} stages")
    return missing


def matrix_class(arch: str, kernel: str, dtype: str, config: Row) -> str:
    """Return the matrix instruction that a kernel must have.

    The best of the architecture; but mma.sync in decoding, where tiles are small (the weight's 16 rows times the
    tokens), and for tf32 summed over tokens, unless a norm is taken of a block too large for a program of two warps.
    """
    if dtype == "ieee":
        return ""
    small = kernel.startswith("few") or (dtype == "fp32" and kernel == "dvalues")
    small |= dtype == "fp32" and kernel == "block_norms" and (config["warps"] == 2 or config["tile_in"] < 64)
    return "mma.sync" if small else {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05"}[arch]


def copies_transpose(kernel: str, dtype: str, instruction: str) -> bool:
    """Return whether tiles are transposed on their way to shared memory, which only 4-byte copies can do.

    That is so for norms of float32 where a program holds a large tile: wgmma and tcgen05 want tf32 along K, the tokens.
    """
    return dtype == "fp32" and kernel in TRANSPOSED_TF32 and instruction in ("wgmma", "tcgen05")


def worse(old: Row, new: Row) -> list[str]:
    """Return in which ways a row is worse than the committed one."""
    found = []
    if CLASSES.index(new["instruction"]) < CLASSES.index(old["instruction"]):
        found.append(f"products by {new['instruction'] or 'scalars'}, not {old['instruction']}")
    if narrowest(new) < narrowest(old):
        found.append(f"copies of {narrowest(new)} bytes, not {narrowest(old)}")
    if new["buffers"] < old["buffers"]:
        found.append(f"buffers {old['buffers']} -> {new['buffers']}")
    if new["buffers"] == old["buffers"] and new["shared"] > old["shared"]:
        found.append(f"shared memory {old['shared']} -> {new['shared']}")
    for column in ("spills", "per_block"):
        if new[column] > old[column]:
            found.append(f"{column} {old[column]} -> {new[column]}")
    return found


def narrowest(row: Row) -> int:
    """Return the bytes of the narrowest asynchronous copy; the copy engine moves any number, nothing moves 0."""
    return min((1024 if width == "tma" else int(width) for width in row["copies"]), default=0)


def judge(
    old: dict[str, Row], new: dict[str, Row], same_compiler: bool, may_worsen: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
    """Compare rows with the committed ones; those that match a pattern of ``may_worsen`` with the requirements only.

    Returns:
        What is wrong, a line each: requirements not met and, if both are of one version of Triton, rows that got worse;
        and the names of the rows that are new or got better, or differ at all with another version.
    """
    wrong, changed = [], []
    for case, row in new.items():
        problems = requirements(case, row)
        if case in old and same_compiler and not any(fnmatch.fnmatchcase(case, p) for p in may_worsen):
            problems += worse(old[case], row)
        wrong += [f"{case}: {problem}" for problem in problems]
        if row != old.get(case):
            changed.append(case)
    return wrong, changed
