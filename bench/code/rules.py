"""What compiled kernels must be, and what it means that one got worse. The rows are those of :mod:`bench.gpu_code`.

The requirements hold with any version of Triton; the numbers of the committed table with the version that made it.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

from bench.code.cases import STREAMS

Row = dict[str, Any]

CLASSES = ("", "mma.sync", "wgmma", "tcgen05")
"""Kinds of matrix instructions, weakest first: none, of a warp, of four warps, of Blackwell's tensor memory."""

TRANSPOSED_TF32 = ("dvalues", "block_norms", "all_block_norms")
"""Kernels that sum over tokens, along which neither operand is contiguous: wgmma reads no tf32 so."""

SPILLS_ALLOWED = {"sm_100": 16}
"""Bytes. The assembler for Blackwell (CUDA 13.1, with Triton 3.7.1) puts one or two masks of some kernels on the stack,
with 56 of 255 registers in use."""

TMA_WIDTH = 1024
"""The copy engine moves any number of bytes: more than the widest of the other copies."""


def requirements(case: str, row: Row) -> list[str]:
    """Return what a row must be and is not."""
    arch, kernel, dtype, _ = case.split()
    kernel = kernel if kernel in STREAMS else kernel.removeprefix("conv2d_")  # the same loop, other addresses
    missing = []
    if row["spills"] > SPILLS_ALLOWED.get(arch, 0):
        missing.append(f"it spills {row['spills']} bytes")
    if kernel in STREAMS:
        return missing  # they stream: no product, no pipeline

    wanted = matrix_class(arch, kernel, dtype, row["config"])
    if row["instruction"] != wanted:
        missing.append(f"its products are {row['instruction'] or 'scalar'}, not {wanted or 'scalar'}")
    widths = copies_allowed(kernel, dtype, wanted)
    if not row["copies"] or not set(row["copies"]) <= set(widths):
        asked = " or ".join(widths)
        missing.append(f"its copies are {', '.join(row['copies']) or 'not asynchronous'}, not {asked}")
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
    return "mma.sync" if small else {"sm_90": "wgmma", "sm_100": "tcgen05"}.get(arch, "mma.sync")


def copies_allowed(kernel: str, dtype: str, instruction: str) -> tuple[str, ...]:
    """Return the bytes that the asynchronous copies of a kernel may have, ``tma`` for the copy engine.

    For norms of float32 where a program holds a large tile, wgmma wants tf32 along K, the tokens: tiles are transposed
    on their way to shared memory, which only 4-byte copies can do. On sm_100 that is what Triton 3.7.1 emits, not what
    the hardware asks for: tcgen05 reads tf32 along either axis, so wider ones are right too.
    """
    if kernel.endswith("_tma"):
        return ("tma",)
    if dtype == "fp32" and kernel in TRANSPOSED_TF32 and instruction in ("wgmma", "tcgen05"):
        return ("4",) if instruction == "wgmma" else ("4", "8", "16")
    return ("16",)


def worse(old: Row, new: Row) -> list[str]:
    """Return in which ways a row is worse than the committed one."""
    found = []
    if CLASSES.index(new["instruction"]) < CLASSES.index(old["instruction"]):
        found.append(f"products by {new['instruction'] or 'scalars'}, not {old['instruction']}")
    if narrowest(new) < narrowest(old):
        wanted = "by TMA" if narrowest(old) == TMA_WIDTH else str(narrowest(old))
        found.append(f"copies of {narrowest(new)} bytes, not {wanted}")
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
    return min((TMA_WIDTH if width == "tma" else int(width) for width in row["copies"]), default=0)


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
