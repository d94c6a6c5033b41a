"""Fills Triton's cache with what is going to be timed: several processes, side by side.

Each process does its share of the calls once with each configuration; nothing is timed here, so that they may disturb
each other.

    python -m bench.gpu.compile_ahead SHARE OF --out FOLDER [--guesses] [--rehearse]
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

import torch
from sparsekern.kernels.gpu import roofline

from bench.gpu.calls import AnyCase, call_with, calls, headlines, problem_of, scene_of
from bench.gpu.part import Part, parser, prepare, shared_options
from bench.gpu.results import ROOT, read_rows

MOST = 12
"""Processes: most of the time is compiling, one core each."""


def compile_side_by_side(part: Part, share: float, guesses: bool = False) -> None:
    """Let several processes compile, and stop them when their time is over.

    Args:
        part: whose calls are compiled.
        share: of the time that is left to the part.
        guesses: only the headlines, each with the first guess of the roofline.
    """
    count = 1 if part.rehearsal else max(1, min(MOST, (os.cpu_count() or 1) - 2))
    command = [sys.executable, "-m", "bench.gpu.compile_ahead"]
    common = ["--out", str(part.out), *shared_options(part.options), *(["--guesses"] if guesses else [])]
    until = time.monotonic() + share * part.left()
    running = [subprocess.Popen([*command, str(i), str(count), *common], cwd=ROOT) for i in range(count)]
    try:
        for process in running:
            process.wait(max(0.1, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        print("compiling side by side is stopped; the rest is compiled one by one")
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
            process.wait()


def main() -> int:
    """Compile a share; errors are the measuring part's to report."""
    options = parser(__doc__)
    options.add_argument("share", type=int)
    options.add_argument("of", type=int)
    options.add_argument("--guesses", action="store_true", help="the headlines, with the first guess of each")
    given = options.parse_args()
    device = prepare(given.out, given.rehearse, given.no_tma)
    if device is None:
        return 2
    from sparsekern.kernels.gpu.linear import FEW_TOKENS

    torch.set_float32_matmul_precision("high")
    measured = {row.get("key") for row in read_rows(given.out / "tune.jsonl") if "chosen" in row}
    asked: list[AnyCase] = headlines(given.rehearse) if given.guesses else calls(given.rehearse)
    problems = [(case, problem_of(case, device, FEW_TOKENS)) for case in asked]
    most = 1 if given.guesses else None
    jobs = [(c, config) for c, p in problems if p.key not in measured for config in roofline.candidates(p)[:most]]
    last = scene = None
    for case, config in jobs[given.share :: given.of][: 1 if given.rehearse else None]:
        try:
            if scene is None or last != case:
                last, scene = case, scene_of(case, device)
            call_with(scene, case.op, config)
        except Exception as error:
            print(f"compile: {case.key} {config}: {type(error).__name__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
