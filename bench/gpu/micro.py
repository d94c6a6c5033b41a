"""What the device does at best: copying, cuBLAS, gathering from the L2 cache, multiplying at N = 16 to 256.

These are the constants of the package's roofline (kernels/gpu/configs/devices.json); each kernel's answer is checked.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from sparsekern.kernels.gpu.launch import multiprocessors

from bench.gpu.part import Part, main, say_what_failed
from bench.gpu.results import Row
from sparsekern.analysis.clock import Clock, check_device

Measurement = tuple[str, Callable[[Clock, bool], Row]]

WIDTHS = (16, 32, 64, 128)
"""Columns of a gathered block, as half-precision numbers."""

SIDES = (16, 32, 64, 128, 256)
"""N of the matrix instruction."""


def measurements() -> Iterator[Measurement]:
    """Yield names and functions."""
    yield "copy", copy
    for dtype in ("bf16", "fp16", "tf32", "ieee"):
        yield f"cublas {dtype}", lambda clock, tiny, dtype=dtype: cublas(clock, tiny, dtype)
    for width in WIDTHS:
        yield f"gather {width}", lambda clock, tiny, width=width: gather(clock, tiny, width)
    for fed in (False, True):
        for side in SIDES:
            name = f"dots {'fed ' if fed else ''}N={side}"
            yield name, lambda clock, tiny, side=side, fed=fed: dots(clock, tiny, side, fed)


def copy(clock: Clock, tiny: bool) -> Row:
    """Return the rate of a copy within the device's memory, bytes read plus bytes written."""
    source = torch.arange(1024 if tiny else 2**28, dtype=torch.int32, device=clock.device)
    target = torch.empty_like(source)
    seconds = clock.median_seconds(lambda: target.copy_(source))
    assert torch.equal(source, target)
    return {"tb_s": 2 * source.numel() * 4 / seconds / 1e12, "ms": seconds * 1e3}


def cublas(clock: Clock, tiny: bool, dtype: str) -> Row:
    """Return the rate of a dense product of 8192 tokens with a weight of 4096 x 4096."""
    tokens, features = (16, 64) if tiny else (8192, 4096)
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype, torch.float32)
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    x = torch.randn(tokens, features, device=clock.device).to(kind)
    weight = torch.randn(features, features, device=clock.device).to(kind)
    seconds = clock.median_seconds(lambda: x @ weight.T)
    exact = x[:16].double() @ weight.double().T
    share = float(((x @ weight.T)[:16].double() - exact).norm() / exact.norm())
    assert share <= 2**-7, f"off by {share:.2g} of its norm"
    return {"tflops": 2 * tokens * features**2 / seconds / 1e12, "ms": seconds * 1e3}


def gather(clock: Clock, tiny: bool, width: int) -> Row:
    """Return the best rate at which tiles of 128 rows, made of blocks this wide, come out of the L2 cache."""
    from bench.gpu.micro_kernels import gather_kernel

    words, tile_t = (128, 16) if tiny else (2048, 128)
    rows = 64 if tiny else max(tile_t, gathered_bytes(clock.device) // (4 * words) // tile_t * tile_t)
    side, tile_k = width // 2, max(32, width // 2)  # a tile is at least a cache line of 128 bytes wide
    tiles, turns, blocks = rows // tile_t, 4 if tiny else 128, words // side
    programs = 2 if tiny else 32 * multiprocessors(clock.device)  # many, so that the last wave counts little
    x = torch.randint(-(2**31), 2**31 - 1, (rows, words), dtype=torch.int32, device=clock.device)
    out = x.new_empty(programs, tile_t, tile_k)

    best: Row = {}
    for stages in (1,) if tiny else (2, 4, 6):
        for warps in (4, 8):

            def run(stages: int = stages, warps: int = warps) -> None:
                gather_kernel[(programs,)](
                    x, out, words // 4, turns, tiles, blocks - 1,
                    WORDS=side, TILE_K=tile_k, TILE_T=tile_t, STAGES=stages, num_warps=warps,
                )  # fmt: skip

            seconds = clock.median_seconds(run)
            rate = programs * turns * tile_t * tile_k * 4 / seconds / 1e12
            if rate > best.get("tb_s", 0.0):
                best = {"tb_s": rate, "ms": seconds * 1e3, "stages": stages, "warps": warps}
            if tiny:
                break
    last, number = programs - 1, torch.arange(turns * tile_k // side, device=clock.device)
    number = (last * turns * tile_k // side + number).int() * torch.tensor(-1640531535, dtype=torch.int32)
    block = ((number >> 16) & (blocks - 1)).long().view(turns, -1, 1)
    at = (block * side + torch.arange(side, device=clock.device)).flatten(1)  # (turns, k)
    first = last % tiles * tile_t
    wanted = x[first : first + tile_t].long()[:, at].sum(1)
    assert torch.equal(out[last].long(), (wanted + 2**31) % 2**32 - 2**31), "the sum of the gathered tiles is wrong"
    return best


def gathered_bytes(device: torch.device) -> int:
    """Return half of the L2 cache, which fits into either half of Hopper's too; 16 MiB if its size is not known."""
    size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
    return int(size) // 2 or 16 * 2**20


def dots(clock: Clock, tiny: bool, side: int, fed: bool) -> Row:
    """Return the rate of 128 tokens times N columns, the operands in shared memory or loaded each turn (K = 64)."""
    from bench.gpu.micro_kernels import dots_kernel

    m, k, turns = (16, 16, 2) if tiny else (128, 64, 256)
    kind = torch.float16 if tiny else torch.bfloat16  # the interpreter multiplies the bits of bf16 as integers
    programs = 1 if tiny else 24 * multiprocessors(clock.device)  # whole waves, whether 1, 2, 3, 4 or 6 run at a time
    signs = torch.tensor([-1.0, 1.0], device=clock.device)
    a = signs[torch.randint(2, (m, k), device=clock.device)].to(kind).repeat(2, 1).view(2, m, k)
    b = signs[torch.randint(2, (k, side), device=clock.device)].to(kind).repeat(2, 1).view(2, k, side)
    out = torch.empty(programs, m, side, device=clock.device)

    best: Row = {}
    for warps in (4, 8):
        for stages in (3,) if not fed or tiny else (3, 4):

            def run(stages: int = stages, warps: int = warps) -> None:
                dots_kernel[(programs,)](a, b, out, turns, M=m, N=side, K=k, FED=fed, STAGES=stages, num_warps=warps)

            try:
                seconds = clock.median_seconds(run)
            except Exception:  # registers or shared memory do not suffice for this N; another one may do
                check_device(clock.device)
                continue
            rate = 2 * programs * turns * m * side * k / seconds / 1e12
            if rate > best.get("tflops", 0.0):
                best = {"tflops": rate, "ms": seconds * 1e3, "stages": stages, "warps": warps}
    assert best, "no configuration runs"
    assert torch.equal(out[-1], turns * (a[0].float() @ b[0].float())), "the product is wrong"  # small integers: exact
    return best


def run(part: Part) -> bool:
    """Run what is not in the results yet; return whether all is."""
    clock = Clock(part.device, device_alone=True)
    for name, measure in measurements():
        if part.results.has(name):
            continue
        if part.over(0.0 if part.rehearsal else 1.0):
            return False
        part.results.begin(name)
        try:
            row = measure(clock, part.rehearsal)
        except Exception as error:
            row = {"error": say_what_failed(error)}
        part.results.add({"key": name, **row})
        print(
            f"micro: {name}: " + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else str(v) for k, v in row.items())
        )
        if "error" in row:
            check_device(part.device)
    return True


if __name__ == "__main__":
    sys.exit(main("micro", __doc__, run))
