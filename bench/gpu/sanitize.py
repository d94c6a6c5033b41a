"""compute-sanitizer on small calls of each kernel, where the program exists: reads and writes outside of tensors.

The calls have edges of every kind: tokens that fill no tile, features that fill no block, empty block rows, free slots.
PyTorch's memory pool is off, for else a read beyond a tensor is a read inside the pool.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time

import torch
from sparsekern.kernels import gpu

from bench.gpu.part import FAILED, FINISHED, NO_DEVICE, PARTLY, parser, prepare
from bench.gpu.results import ROOT, circumstances, write_json
from sparsekern.topology import Grid, Topology, build_index, random, with_capacity

FOUND = 9
"""Exit code of the sanitizer when it found something."""


def call_kernels(device: torch.device, rehearsal: bool, until: float) -> int:
    """Call every kernel on small edge cases, most telling first, and return how many calls that were.

    Nothing is begun after ``until``: a program that is stopped gets no verdict.
    """
    kinds = (torch.float16,) if rehearsal else (torch.bfloat16, torch.float32, torch.float16)
    sizes = ((16, 40, 70, 50),) if rehearsal else ((16, 40, 70, 50), (128, 200, 300, 257), (64, 3, 200, 130))
    calls = 0
    for kind in kinds:
        for side, tokens, out_features, in_features in sizes:
            if time.monotonic() > until:
                return calls
            grid = Grid(out_features, in_features, (side, side))
            generator = torch.Generator().manual_seed(side)
            drawn = random(grid, max(1, grid.cells // 2), generator)
            roomy = with_capacity(drawn, drawn.slots + 2)
            index = build_index(Topology(grid, roomy.row.to(device), roomy.col.to(device)))
            x = torch.randn(tokens, in_features, generator=generator).to(device, kind)
            dy = torch.randn(tokens, out_features, generator=generator).to(device, kind)
            values = torch.randn(roomy.slots, side, side, generator=generator).to(device, kind)
            bias = torch.randn(out_features, generator=generator).to(device, kind)
            gpu.fwd(x, values, bias, index, out_features)
            gpu.dx(dy, values, index, in_features)
            gpu.dvalues(dy, x, index, grid.block, kind)
            row, col = drawn.row.to(device), drawn.col.to(device)
            gpu.block_norms(dy, x, row, col, grid.block)
            gpu.all_block_norms(dy, x, grid.block)
            calls += 5
            if device.type == "cuda":
                torch.cuda.synchronize()
    return calls


def main() -> int:
    """Write ``sanitizer.json``; with ``--inside`` be the program that is looked at."""
    options = parser(__doc__)
    options.add_argument("--inside", action="store_true", help="call the kernels, nothing else")
    given = options.parse_args()
    device = prepare(given.out, given.rehearse)
    if device is None:
        print("sanitizer: there is no GPU that PyTorch can use")
        return NO_DEVICE
    if given.inside:
        print(f"{call_kernels(device, given.rehearse, time.monotonic() + 0.5 * given.seconds)} calls")
        return FINISHED

    row = circumstances("sanitizer", given.rehearse)
    program = shutil.which("compute-sanitizer")
    inside = [
        sys.executable,
        "-m",
        "bench.gpu.sanitize",
        "--inside",
        "--out",
        str(given.out),
        "--seconds",
        str(given.seconds),
    ]
    inside += ["--rehearse"] if given.rehearse else []
    command = [] if program is None else [program, "--tool", "memcheck", "--error-exitcode", str(FOUND)]
    try:
        ran = subprocess.run(
            [*command, *inside],
            cwd=ROOT,
            env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            capture_output=True,
            text=True,
            timeout=given.seconds,
        )
    except subprocess.TimeoutExpired:
        print(f"sanitizer: not done in {given.seconds:.0f} s")  # nothing is written: the next run tries again
        return PARTLY
    output = ran.stdout + ran.stderr
    summary = re.findall(r"ERROR SUMMARY: (\d+) error", output)
    called = re.findall(r"(\d+) calls", output)
    row |= {
        "program": program,
        "code": ran.returncode,
        "errors": int(summary[-1]) if summary else None,
        "calls": int(called[-1]) if called else None,
        "output": "" if ran.returncode == 0 else output[-6000:],
    }
    if program is None:
        row["reason"] = "compute-sanitizer is not installed; the calls were made without it"
    # On some virtual machines the program exists and cannot attach: no verdict, which is not a failure of the kernels.
    elif ran.returncode != 0 and not summary:
        row["reason"] = "compute-sanitizer gave no verdict here"
    bad = ran.returncode != 0 and (program is None or bool(summary))
    if bad:
        print(output[-3000:])
    print(f"sanitizer: {row.get('reason', '')} errors {row['errors']}, calls {row['calls']}")
    write_json(given.out / ("sanitizer-failed.json" if bad else "sanitizer.json"), row)
    return FAILED if bad else FINISHED


if __name__ == "__main__":
    sys.exit(main())
