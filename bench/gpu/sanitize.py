"""compute-sanitizer on small calls of each kernel, where the program exists: reads and writes outside of tensors.

The calls have edges of every kind: tokens that fill no tile, features that fill no block, empty block rows, free slots.
PyTorch's memory pool is off, because otherwise a read beyond a tensor is a read inside the pool.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from typing import NamedTuple

import torch
from sparsekern.kernels import gpu
from sparsekern.kernels.contract import ConvShape, LinearShape
from sparsekern.kernels.gpu import roofline
from sparsekern.kernels.gpu.config import Config, Multiply, Problem

from bench.gpu.calls import Launch, choosing
from bench.gpu.part import FAILED, FINISHED, MIXED, NO_DEVICE, PARTLY, parser, prepare, shared_options
from bench.gpu.results import ROOT, Row, circumstances, delete, other_results, write_json
from sparsekern.topology import Grid, Topology, build_index, conv_grid, random, with_capacity

FOUND = 9
"""Exit code of the sanitizer when it found something."""


class Size(NamedTuple):
    """What a round of calls is made with."""

    side: int
    tokens: int
    out_features: int
    in_features: int
    tma: bool = False
    """Whether products go through the copy engine; if not, they read by pointers, on any device."""
    share: float = 0.5
    """Part of the blocks that is stored; at least one is."""


SIZES = (
    Size(16, 40, 70, 50),
    Size(64, 200, 200, 136, tma=True),  # rows are multiples of 16 bytes, as the copy engine wants them
    Size(128, 200, 300, 257),
    Size(16, 2100, 30, 20, share=0.0),  # one block, many tokens: they are split, and the splits added up
    Size(64, 3, 200, 130),
)
REHEARSED = (Size(16, 40, 70, 50), Size(64, 70, 72, 72, tma=True), Size(16, 2100, 16, 16), Size(16, 3, 20, 20))


def call_kernels(device: torch.device, rehearsal: bool, until: float) -> int:
    """Call every kernel on small edge cases, most telling first, and return how many calls that were.

    Nothing is begun after ``until``: a program that is stopped gets no verdict.
    """
    kinds = (torch.float16,) if rehearsal else (torch.bfloat16, torch.float32, torch.float16)
    calls = 0
    for kind in kinds:
        for size in REHEARSED if rehearsal else SIZES:
            if time.monotonic() > until:
                return calls
            with choosing(lambda which, launch, tma=size.tma: configuration(which, launch, tma)):  # type: ignore[misc]
                calls += call_each(size, device, kind)
            if device.type == "cuda":
                torch.cuda.synchronize()
    return calls


def configuration(which: Problem, launch: Launch, tma: bool) -> Config:
    """Return the first guess of the roofline, with the copy engine or without it, in tiles that fit a small call."""
    best = roofline.candidates(which)[0]
    if not isinstance(best, Multiply):
        return best
    if not tma:
        return replace(best, tma=False)
    return replace(best, tile_t=64, tile_k=min(best.tile_k, which.summed), tma=bool(roofline.device(which.arch)["tma"]))


def call_each(size: Size, device: torch.device, kind: torch.dtype) -> int:
    """Call each function of the package's GPU kernels once and return how many there are."""
    grid = Grid(size.out_features, size.in_features, (size.side, size.side))
    generator = torch.Generator().manual_seed(size.side)
    drawn = random(grid, max(1, int(size.share * grid.cells)), generator)
    roomy = with_capacity(drawn, drawn.slots + 2)
    index = build_index(Topology(grid, roomy.row.to(device), roomy.col.to(device)))

    def numbers(*shape: int, dtype: torch.dtype = kind) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    x, dy = numbers(size.tokens, size.in_features), numbers(size.tokens, size.out_features)
    values, bias = numbers(roomy.slots, size.side, size.side), numbers(size.out_features)
    sizes = LinearShape(size.in_features, size.out_features)
    kernels = gpu.kernels(sizes)
    kernels.fwd(x, values, bias, index, sizes)
    kernels.dx(dy, values, index, sizes, ())
    kernels.dvalues(dy, x, index, grid.block, sizes, kind)
    row, col = drawn.row.to(device), drawn.col.to(device)
    kernels.block_norms(dy, x, row, col, grid.block, sizes)
    kernels.all_block_norms(dy, x, grid.block, sizes)
    u, v = (numbers(2, features, dtype=torch.float32) for features in (size.out_features, size.in_features))
    kernels.sketch(dy, x, u, v, grid.block, sizes)
    return 6 + call_convolution(size, device, kind)


def call_convolution(size: Size, device: torch.device, kind: torch.dtype) -> int:
    """Call each function of the convolution once, of as many pixels as tokens, and return how many there are."""
    edge = max(2, math.isqrt(size.tokens // 2))
    shape = ConvShape(2 * size.in_features, 2 * size.out_features, (3, 2), (2, 1), (1, 1, 0, 1), (1, 1), groups=2)
    grid = conv_grid(shape.in_channels, shape.out_channels, shape.kernel, (size.side, size.side), shape.groups)
    generator = torch.Generator().manual_seed(size.side)
    drawn = random(grid, max(1, int(size.share * grid.cells)), generator)
    roomy = with_capacity(drawn, drawn.slots + 2)
    index = build_index(Topology(grid, roomy.row.to(device), roomy.col.to(device)))

    def images(channels: int, height: int, width: int) -> torch.Tensor:
        return torch.randn(2, height, width, channels, generator=generator).to(device, kind).permute(0, 3, 1, 2)

    x, dy = images(shape.in_channels, edge, edge), images(shape.out_channels, *shape.output_size(edge, edge))
    values = torch.randn(roomy.slots, *grid.block, generator=generator).to(device, kind)
    bias, (row, col) = torch.zeros(shape.out_channels, device=device, dtype=kind), (drawn.row, drawn.col)
    kernels = gpu.kernels(shape)
    kernels.fwd(x, values, bias, index, shape)
    kernels.dx(dy, values, index, shape, (edge, edge))
    kernels.dvalues(dy, x, index, grid.block, shape, kind)
    kernels.block_norms(dy, x, row.to(device), col.to(device), grid.block, shape)
    kernels.all_block_norms(dy, x, grid.block, shape)
    u, v = (torch.ones(2, features, device=device) for features in (grid.out_features, grid.in_features))
    kernels.sketch(dy, x, u, v, grid.block, shape)
    return 6


def main() -> int:
    """Write ``sanitizer.json``; with ``--inside`` be the program that is looked at."""
    options = parser(__doc__)
    options.add_argument("--inside", action="store_true", help="call the kernels, nothing else")
    given = options.parse_args()
    device = prepare(given.out, given.rehearse, given.no_tma)
    if device is None:
        print("sanitizer: there is no GPU that PyTorch can use")
        return NO_DEVICE
    if given.inside:
        print(f"{call_kernels(device, given.rehearse, time.monotonic() + 0.5 * given.seconds)} calls")
        return FINISHED
    if given.force:
        delete(given.out, "sanitizer")
    row = circumstances("sanitizer", given.rehearse)
    if said := other_results(given.out, row):
        print(f"error: {said}", file=sys.stderr)
        return MIXED
    program = shutil.which("compute-sanitizer")
    command = [] if program is None else [program, "--tool", "memcheck", "--error-exitcode", str(FOUND)]
    command += [sys.executable, "-m", "bench.gpu.sanitize", "--inside"]
    command += ["--out", str(given.out), "--seconds", str(given.seconds), *shared_options(given)]
    try:
        ran = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            capture_output=True,
            text=True,
            timeout=given.seconds,
        )
    except subprocess.TimeoutExpired:
        print(f"sanitizer: not done in {given.seconds:.0f} s")  # nothing is written: the next run tries again
        return PARTLY
    row |= outcome(program, ran.returncode, ran.stdout + ran.stderr)
    if row["failed"]:
        print(row["output"][-3000:])
    print(f"sanitizer: {row.get('reason', '')} errors {row['errors']}, calls {row['calls']}")
    write_json(given.out / "sanitizer.json", row)
    return FAILED if row["failed"] else FINISHED


def outcome(program: str | None, code: int, output: str) -> Row:
    """Return what a run of the calls has shown, as fields of a row; one file tells it, good or bad."""
    summary, called = re.findall(r"ERROR SUMMARY: (\d+) error", output), re.findall(r"(\d+) calls", output)
    row: Row = {
        "failed": code != 0 and (program is None or bool(summary)),
        "program": program,
        "code": code,
        "errors": int(summary[-1]) if summary else None,
        "calls": int(called[-1]) if called else None,
        "output": "" if code == 0 else output[-6000:],
    }
    if program is None:
        row["reason"] = "compute-sanitizer is not installed; the calls were made without it"
    # On some virtual machines the program exists and cannot attach: no verdict, which is not a failure of the kernels.
    elif code != 0 and not summary:
        row["reason"] = "compute-sanitizer gave no verdict here"
    return row


if __name__ == "__main__":
    sys.exit(main())
