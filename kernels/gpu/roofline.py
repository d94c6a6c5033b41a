"""Configurations worth trying, best guess first. The first one runs where nothing was measured.

The guess is a roofline per stored FLOP: gathering from the L2 cache, the tensor cores, and issuing instructions,
whichever is slowest; or the latency of a program that starts, loads and stores, shared by those that a multiprocessor
holds. Rows have few blocks, so a program takes few turns, and the second counts: two programs side by side are worth
more than one large tile. The device constants (``configs/devices.json``) are data sheets and estimates, so it orders
configurations and predicts no times.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from sparsekern.kernels.contract import PADDING
from sparsekern.kernels.gpu.config import KINDS, Config, FewTokens, Multiply, Outer, Problem, Supertile, package_data

LATENCY = 0.8e-6
"""Seconds from asking the L2 cache to having the answer in shared memory, under load: an estimate."""

NEAR = 1.125
"""Costs that differ by less are the same: the constants are no better. The smaller tile is the safer guess then."""

LINE = 128
"""Bytes of a cache line."""

ASSUMED = 4096
"""Features of the output: a problem does not say how many there are, and so how many programs."""

IDLE = 9
"""Up to ``2 ** IDLE`` tokens, rows of large blocks are too few programs to fill a device."""

STAGES = (4, 3, 5)
"""Buffers of a pipeline, in the order of preference where the cost is the same."""

MOST = 10
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
    ranked = sorted((c for c in _all(problem) if fits(problem, c)), key=lambda c: cost(problem, c))
    near = [c for c in ranked if cost(problem, c) <= NEAR * cost(problem, ranked[0])]
    first = min(near, key=lambda c: tile(problem, c)[0] * tile(problem, c)[1])
    ranked = [first, *(c for c in ranked if c != first)]
    # A tuner learns more from another tile than from another number of stages: one of each shape, then the rest.
    shapes = {_shape(c): c for c in reversed(ranked)}
    distinct = [c for c in ranked if shapes[_shape(c)] is c][: MOST - 3]
    return [*distinct, *(c for c in ranked if c not in distinct)][:MOST]


def _shape(config: Config) -> Config:
    """Return a configuration without what changes its tiles least: the buffers, and how often tokens are split."""
    return replace(config, stages=0, waves=1) if isinstance(config, Outer) else replace(config, stages=0)


def tile(problem: Problem, config: Config) -> tuple[int, int, int]:
    """Return ``(M, N, K)`` of the ``tl.dot`` in the loop of a kernel."""
    if isinstance(config, Multiply):
        return config.tile_t, problem.kept // config.cut, config.tile_k
    if isinstance(config, FewTokens):
        return config.tile_n, max(16, 2**problem.log2_tokens), config.tile_k
    if isinstance(config, Outer):
        return config.tile_in, problem.bo, config.tile_t
    return config.tile_out, config.tile_in, config.tile_t


def from_shared(problem: Problem, config: Config) -> bool:
    """Return whether the tensor cores read both operands from shared memory: wgmma or tcgen05, not mma.sync."""
    large = tile(problem, config)[0] >= 64 and config.warps % 4 == 0
    return large and problem.dtype != "ieee" and bool(device(problem.arch)["from_shared"])


def buffers(problem: Problem, config: Config) -> int:
    """Return how many tiles of each operand Triton holds in shared memory for ``num_stages``.

    mma.sync multiplies registers: the tile that is in use needs no buffer any more.
    """
    return config.stages if from_shared(problem, config) else config.stages - 1


def shared_bytes(problem: Problem, config: Config) -> int:
    """Return the shared memory of a program: the buffers of both operands of ``tl.dot``."""
    m, n, k = tile(problem, config)
    values = 4 if isinstance(config, FewTokens) else problem.itemsize  # those of float32 are converted after the read
    return (m * values + n * problem.itemsize) * k * buffers(problem, config)


def fits(problem: Problem, config: Config) -> bool:
    """Return whether the tile fits the block, the buffers the shared memory and the accumulator the registers.

    An accumulator may have a quarter of them, half where the tensor cores read 2-byte operands from shared memory: the
    rest is for addresses, and with mma.sync for the operands too.
    """
    m, n, k = tile(problem, config)
    if isinstance(config, (Multiply, FewTokens)) and 2 * (config.tile_k // problem.summed) > PADDING:
        return False  # it reads ahead in the lists of the index
    if isinstance(config, Multiply) and config.tma and (config.tile_k > problem.summed or n < 64):
        return False
    if isinstance(config, Multiply) and problem.is_conv2d and (config.tma or k * problem.itemsize > LINE):
        return False  # the pixels of a tile do not lie in a box; and two lines of K spill up to 2.9 KB (Triton 3.6)
    if isinstance(config, Multiply) and config.cut > 1 and (problem.is_conv2d or n < 32 or problem.kept % config.cut):
        return False
    if from_shared(problem, config) and m == 64 and config.warps == 8 and n < 32:
        return False  # m64n8: two groups of warps share N, and Triton swizzles 32 bytes, near a fault that is open
    if isinstance(config, FewTokens) and problem.kept % config.tile_n:
        return False
    if isinstance(config, Outer) and problem.takes_norms and config.tile_in < problem.bi:
        return False
    if isinstance(config, Supertile) and (config.tile_out % problem.bo or config.tile_in % problem.bi):
        return False
    enough = shared_bytes(problem, config) + 1024 <= device(problem.arch)["shared_kib"] * 1024
    limit = 128 if from_shared(problem, config) and problem.itemsize == 2 else 64
    return enough and m * n <= limit * 32 * config.warps


def cost(problem: Problem, config: Config) -> float:
    """Return the predicted seconds per FLOP of the whole device, in no absolute sense; see the head of this file."""
    d, (m, n, k) = device(problem.arch), tile(problem, config)
    flops = 2 * m * n * k
    bytes_moved = (m + n) * k * problem.itemsize
    kind = problem.dtype if problem.dtype == "ieee" else "tf32" if problem.dtype == "fp32" else "half"
    threads = 32 * config.warps
    gather = bytes_moved / (d["l2_tb_s"] * 1e12 / d["sms"])
    tensor = flops / (d["tflops"][kind] * 1e12 / d["sms"])
    # Counted in compiled loops (bench/gpu_code.py): some 65 instructions per turn and warp, 3 per 16-byte copy. The
    # copy engine needs no addresses, but barriers.
    copies = bytes_moved / 16 / threads
    per_warp = (103 if isinstance(config, Multiply) and config.tma else 65 + 3 * copies) + m * n * k / 2**17
    issue = per_warp * config.warps / 4 / (d["clock_ghz"] * 1e9)
    busy = max(gather, tensor, issue) + 0.1 * (gather + tensor + issue)

    turns, useful = _turns(problem, config)
    registers = (m * n // threads + (64 if from_shared(problem, config) else 104)) * threads
    shared = shared_bytes(problem, config) + 1024
    resident = max(1, min((d["shared_kib"] + 1) * 1024 // shared, 65536 // registers, 4))
    if isinstance(config, FewTokens):
        resident = min(resident, 32 // config.tile_n)  # decoding has few programs, and half as many of twice the height
    idle = 1.0
    if isinstance(config, Multiply):
        programs = 2**problem.log2_tokens / m * ASSUMED / n
        idle, resident = max(1.0, d["sms"] / programs), min(resident, max(1, int(programs / d["sms"])))
    alone = 2 * LATENCY + turns * max(busy, LATENCY / (config.stages - 1))
    seconds: float = idle * max(turns * busy, alone / resident) / (turns * flops * useful)
    return seconds


def _turns(problem: Problem, config: Config) -> tuple[float, float]:
    """Return how many turns the loop of a program makes, and which part of its products is asked for."""
    tokens, blocks = 2**problem.log2_tokens, 2**problem.log2_blocks
    if isinstance(config, (Multiply, FewTokens)):
        full = blocks * problem.summed / config.tile_k
        used = min(1.0, tokens / config.tile_t) if isinstance(config, Multiply) else 1.0
        return full + 0.5, used * full / (full + 0.5)  # the last tile of K of a row is half empty
    turns = max(1.0, tokens / config.tile_t)
    if isinstance(config, Supertile):
        return turns, 1.0
    return turns, blocks / (blocks + max(0.0, config.tile_in / problem.bi - 1) / 2)  # and so is the last group


def _all(problem: Problem) -> Iterator[Config]:
    wide = LINE // problem.itemsize
    kind = KINDS[problem.kernel]
    if kind is Multiply:
        yield from _multiply(problem, wide)
    elif kind is FewTokens:
        for tile_n in (16, 32):
            for tile_k in (wide, 2 * wide):
                if problem.kept >= tile_n and problem.summed % min(tile_k, problem.summed) == 0:
                    yield from (FewTokens(tile_n, tile_k, warps, stages) for warps in (2, 4) for stages in (4, 6))
    elif kind is Supertile:
        yield from _supertile(problem, wide)
    else:
        yield from _outer(problem, wide)


def _multiply(problem: Problem, wide: int) -> Iterator[Config]:
    # Without tensor cores the operands sit in registers too: other tiles spill somewhere. A convolution holds more.
    tall = problem.kept >= (64 if problem.is_conv2d else 128)
    tma = device(problem.arch)["tma"] and not problem.is_conv2d and min(problem.bo, problem.bi) >= 64
    cuts = (1, 2, 4) if problem.kept == 128 and problem.log2_tokens <= IDLE and problem.dtype != "ieee" else (1,)
    for tile_t in (32, 64, 128, 256):
        for tile_k in (wide, 2 * wide):
            for warps in (4, 8):
                if problem.dtype == "ieee" and (tile_t, warps) != ((64, 8) if tall else (32, 4)):
                    continue
                for cut, stages in itertools.product(cuts, STAGES):
                    yield Multiply(tile_t, tile_k, 8, warps, stages, cut=cut)
                    if tma and tile_k <= problem.summed:
                        yield Multiply(tile_t, tile_k, 8, warps, stages, tma=True, cut=cut)


def _outer(problem: Problem, wide: int) -> Iterator[Config]:
    # Tokens are K here, and wgmma reads tf32 along K only: a transposition, in 4-byte copies (in Triton 3.7.1 tcgen05
    # too). Programs of 2 warps and tiles of 32 rows take mma.sync instead. A norm needs the whole block in one program.
    norm = problem.takes_norms
    along_k = problem.dtype == "fp32" and device(problem.arch)["from_shared"]
    shapes: tuple[tuple[int, int], ...]
    if along_k and not (norm and problem.bo * problem.bi > 64 * 64):
        shapes = ((32, 4), (64, 2), (128, 2)) if norm and problem.bi == 128 else ((32, 4), (64, 2))
    else:
        shapes = ((64, 4), (64, 8), (128, 4), (128, 8))
        if min(problem.bo, problem.bi) >= 64 and problem.itemsize == 2 and not norm:
            shapes = (*shapes, (256, 8))  # a sixth to a quarter fewer bytes from the L2 cache
    for tile_in, warps in shapes:
        if problem.dtype == "ieee" and not norm and tile_in * problem.bo > 32 * 32 * warps:
            continue  # spills, as in _multiply
        if problem.dtype == "ieee" and problem.is_conv2d and tile_in * problem.bo < 128 * 16:
            continue  # so does this one, on sm_80
        if tile_in >= problem.bi or not norm:
            yield from (Outer(tile_in, wide, warps, stages) for stages in STAGES)
            yield from (Outer(tile_in, wide, warps, stages, waves) for waves in (1, 4) for stages in STAGES[:2])


def _supertile(problem: Problem, wide: int) -> Iterator[Config]:
    for tile_out in (64, 128):
        for tile_in in (64, 128):
            if tile_out >= problem.bo and tile_in >= problem.bi:
                for warps in (4, 8):
                    yield from (Supertile(tile_out, tile_in, wide, warps, stages) for stages in STAGES)
