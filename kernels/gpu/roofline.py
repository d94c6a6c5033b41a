"""Configurations worth trying, best guess first: what runs where nothing was measured.

The guess is a roofline a stored FLOP: gathering from the L2 cache, the tensor cores, and issuing instructions,
whichever is slowest; less when the buffers are too few to hide the latency of the memory. Its device constants
(``configs/devices.json``) are data sheets and estimates, so it orders configurations and predicts no times.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sparsekern.kernels.gpu.config import Config, FewTokens, Multiply, Outer, Problem, Supertile, package_data

LATENCY = 0.8e-6
"""Seconds from asking the L2 cache to having the answer in shared memory, under load."""

MOST = 8
"""Configurations that a tuner tries for a problem."""


def device(arch: str) -> dict[str, Any]:
    """Return the constants of an architecture, those of the nearest older one if it is not listed."""
    devices = package_data("devices.json")
    version = int(arch.removeprefix("sm_"))
    known = sorted(int(name.removeprefix("sm_")) for name in devices if name != "about")
    nearest = max((v for v in known if v <= version), default=known[0])
    constants: dict[str, Any] = devices[f"sm_{nearest}"]
    return constants


def candidates(problem: Problem) -> list[Config]:
    """Return at most :data:`MOST` configurations that fit the device, best guess first."""
    fitting = [c for c in _all(problem) if fits(problem, c)]
    return sorted(fitting, key=lambda c: cost(problem, c))[:MOST]


def tile(problem: Problem, config: Config) -> tuple[int, int, int]:
    """Return ``(M, N, K)`` of the ``tl.dot`` in the loop of a kernel."""
    if isinstance(config, Multiply):
        return config.tile_t, problem.kept, config.tile_k
    if isinstance(config, FewTokens):
        return config.tile_n, max(16, 2**problem.log2_tokens), config.tile_k
    if isinstance(config, Outer):
        return config.tile_in, problem.bo, config.tile_t
    return config.tile_out, config.tile_in, config.tile_t


def shared_bytes(problem: Problem, config: Config) -> int:
    """Return the shared memory of a program: both operands of ``tl.dot``, once a stage."""
    m, n, k = tile(problem, config)
    return (m + n) * k * problem.itemsize * config.stages


def fits(problem: Problem, config: Config) -> bool:
    """Return whether the buffers fit the shared memory and the accumulator half of the registers."""
    m, n, _ = tile(problem, config)
    enough = shared_bytes(problem, config) + 1024 <= device(problem.arch)["shared_kib"] * 1024
    limit = 64 if problem.dtype == "ieee" else 128  # without tensor cores the operands sit in registers too
    return enough and m * n <= limit * 32 * config.warps


def cost(problem: Problem, config: Config) -> float:
    """Return the predicted seconds a FLOP of the whole device, in no absolute sense; see the head of this file."""
    d, (m, n, k) = device(problem.arch), tile(problem, config)
    flops = 2 * m * n * k
    bytes_moved = (m + n) * k * problem.itemsize
    kind = problem.dtype if problem.dtype == "ieee" else "tf32" if problem.dtype == "fp32" else "half"
    threads = 32 * config.warps
    registers = (m * n // threads + 64) * threads
    resident = min((d["shared_kib"] + 1) * 1024 // shared_bytes(problem, config), 65536 // registers, 4)
    in_flight = max(1, resident) * (config.stages - 1) * bytes_moved
    needed = d["l2_tb_s"] * 1e12 / d["sms"] * LATENCY
    gather = bytes_moved / (d["l2_tb_s"] * 1e12 / d["sms"]) / min(1.0, in_flight / needed)
    tensor = flops / (d["tflops"][kind] * 1e12 / d["sms"])
    # Counted in compiled loops (bench/gpu_code.py): some 60 instructions a turn and warp, and 3 a 16-byte copy.
    copies = bytes_moved / 16 / threads
    per_warp = (40 if isinstance(config, Multiply) and config.tma else 60 + 3 * copies) + m * n * k / 2**17
    issue = per_warp * config.warps / 4 / (d["clock_ghz"] * 1e9)
    useful = 1.0
    if isinstance(config, Multiply):
        tokens = 2**problem.log2_tokens
        useful = min(1.0, tokens / config.tile_t)
        blocks = 2**problem.log2_blocks * problem.summed / config.tile_k
        useful *= blocks / (blocks + 0.5)  # the last tile of K of a row is half empty
    seconds: float = (max(gather, tensor, issue) + 0.1 * (gather + tensor + issue)) / flops / useful
    return seconds


def _all(problem: Problem) -> Iterator[Config]:
    wide = 64 if problem.itemsize == 2 else 32  # one cache line of K
    if problem.kernel in ("fwd", "dx"):
        yield from _multiply(problem, wide)
    elif problem.kernel in ("few_fwd", "few_dx"):
        for tile_n in (16, 32):
            for tile_k in (wide, 2 * wide):
                if problem.kept >= tile_n and problem.summed % min(tile_k, problem.summed) == 0:
                    yield from (FewTokens(tile_n, tile_k, warps, stages) for warps in (2, 4) for stages in (4, 6))
    elif problem.kernel == "all_block_norms":
        yield from _supertile(problem, wide)
    else:
        yield from _outer(problem, wide)


def _multiply(problem: Problem, wide: int) -> Iterator[Config]:
    tma = device(problem.arch)["tma"] and min(problem.bo, problem.bi) >= 64
    for tile_t in (32, 64, 128, 256):
        for tile_k in (wide, 2 * wide):
            for warps in (4, 8):
                for stages in (3, 4, 5):
                    yield Multiply(tile_t, tile_k, 8, warps, stages)
                    if tma and tile_k <= problem.summed:
                        yield Multiply(tile_t, tile_k, 8, warps, stages, tma=True)


def _outer(problem: Problem, wide: int) -> Iterator[Config]:
    # float32 on Hopper: wgmma reads tf32 along K only, a transposition in 4-byte copies; 32 rows take mma.sync instead.
    narrow = problem.dtype in ("fp32", "ieee") and problem.kernel == "dvalues"
    for tile_in in (32,) if narrow else (64, 128):
        if problem.kernel == "block_norms" and tile_in < problem.bi:
            continue  # a norm needs the whole block
        for warps in (4, 8):
            for stages in (3, 4, 5):
                yield Outer(tile_in, wide, warps, stages)


def _supertile(problem: Problem, wide: int) -> Iterator[Config]:
    for tile_out in (64, 128):
        for tile_in in (64, 128):
            if tile_out >= problem.bo and tile_in >= problem.bi:
                for warps in (4, 8):
                    yield from (Supertile(tile_out, tile_in, wide, warps, stages) for stages in (3, 4))
