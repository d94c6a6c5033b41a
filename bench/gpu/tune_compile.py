"""Fills Triton's cache with the configurations that the tuner is going to time: one process of several, side by side.

Each process does its share of the calls once with each configuration; nothing is timed here, so that they may disturb
each other.

    python -m bench.gpu.tune_compile SHARE OF --out FOLDER [--rehearse]
"""

from __future__ import annotations

import sys

import torch
from sparsekern.kernels.gpu import roofline

from bench.gpu.calls import call_with, calls, problem_of, scene_of
from bench.gpu.part import parser, prepare
from bench.gpu.results import read_rows


def main() -> int:
    """Compile a share; errors are the tuner's to report."""
    options = parser(__doc__)
    options.add_argument("share", type=int)
    options.add_argument("of", type=int)
    given = options.parse_args()
    device = prepare(given.out, given.rehearse)
    if device is None:
        return 2
    from sparsekern.kernels.gpu.linear import FEW_TOKENS

    torch.set_float32_matmul_precision("high")
    measured = {row.get("key") for row in read_rows(given.out / "tune.jsonl") if "chosen" in row}
    waiting = [c for c in calls(given.rehearse) if problem_of(c, device, FEW_TOKENS).key not in measured]
    jobs = [(c, config) for c in waiting for config in roofline.candidates(problem_of(c, device, FEW_TOKENS))]
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
