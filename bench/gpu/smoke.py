"""A smoke test: every family of kernels once, against float64, before anything else is begun.

Each family has a process of its own, and all run side by side: most of the time is compiling, and one that hangs or
takes the GPU down stops no other. Those that load by the copy engine come first; where one of them is wrong,
``gpu_run.sh`` goes on without it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path

import torch
from sparsekern.kernels.gpu import roofline
from sparsekern.kernels.gpu.config import Config, Multiply, Problem
from sparsekern.kernels.gpu.launch import arch

from bench.gpu import scene_conv2d
from bench.gpu.calls import AnyCase, Launch, choosing, ours, scene_of
from bench.gpu.contestants import named
from bench.gpu.part import FINISHED, NO_DEVICE, Part, main, parser, prepare, say_what_failed, shared_options
from bench.gpu.results import ROOT, Row
from bench.gpu.scene import NORMS, Case, Judge

TMA = "tma"
"""How the families that use the copy engine begin."""

POISON_BYTES = 2**29
"""Memory that is filled with NaN and given back first: what no program writes is seen."""

PRODUCTS, ALL = ("fwd", "dx"), ("fwd", "dx", "dvalues")


def families(rehearsal: bool, tma: bool) -> dict[str, list[AnyCase]]:
    """Return the calls of each family. 1000 tokens fill no tile."""
    half = "fp16" if rehearsal else "bf16"  # the interpreter multiplies the bits of bf16 as integers
    tokens, features = (70, 128) if rehearsal else (1000, 1024)

    def calls(ops: tuple[str, ...], block: int, dtype: str = half, tokens: int = tokens) -> list[AnyCase]:
        return [Case(op, dtype, tokens, features, features, block, 0.6) for op in ops]

    def convolutions(ops: tuple[str, ...], block: int, stride: int) -> list[AnyCase]:
        images, size, channels = (1, 5, 64) if rehearsal else (8, 15, 256)
        return [scene_conv2d.Case(op, half, images, size, channels, channels, stride, block, 0.6) for op in ops]

    if rehearsal:
        return {f"{TMA} 64": calls(("fwd",), 64), "conv2d 32": convolutions(ALL, 32, 1)}
    found = {f"{TMA} {block}": calls(PRODUCTS, block) for block in (64, 128)} if tma else {}
    if tma:
        found |= {f"{TMA} 128 tf32": calls(PRODUCTS, 128, "fp32")}
    found |= {f"products {block}": calls(PRODUCTS, block) for block in (16, 32, 64, 128)}
    found |= {f"gradient {block}": calls(("dvalues",), block) for block in (16, 32, 64, 128)}
    found |= {"tf32 32": calls(ALL, 32, "fp32"), "few tokens 32": calls(PRODUCTS, 32, tokens=16)}
    found |= {"norms 32": calls(NORMS, 32), "conv2d 64": convolutions(ALL, 64, 1)}
    return found | {"conv2d 32 stride 2": convolutions((*ALL, *NORMS), 32, 2)}


def guess(which: Problem, tma: bool) -> Config:
    """Return the first guess of the roofline, with the copy engine or without it."""
    best = roofline.candidates(which)[0]
    return replace(best, tma=tma, tile_k=min(best.tile_k, which.summed)) if isinstance(best, Multiply) and tma else best


def check(family: str, case: AnyCase, device: torch.device) -> Row:
    """Return the row of one call."""
    row: Row = {"key": f"{family}, {case.op}", "case": case.key}
    began = time.monotonic()
    chosen: list[Config] = []

    def choose(which: Problem, launch: Launch) -> Config:
        chosen.append(guess(which, family.startswith(TMA)))
        return chosen[-1]

    try:
        scene = scene_of(case, device)
        if device.type == "cuda":
            torch.full((POISON_BYTES // 4,), float("nan"), device=device)
        with choosing(choose):
            answer = named(case.op, ours(scene, case.op).run())
        wrong = Judge(scene, case.op).wrong(answer, by_element=True)
        row |= {} if wrong is None else {"refused": wrong}
    except Exception as error:
        row["error"] = say_what_failed(error)
    return row | {"config": [asdict(config) for config in chosen], "s": round(time.monotonic() - began, 2)}


def check_in_a_process(part: Part, family: str, count: int) -> list[Row]:
    """Return the rows of a family and that of the family itself, which says how its process ended."""
    command = [sys.executable, "-m", "bench.gpu.smoke", "--family", family, "--out", str(part.out)]
    began, error, said = time.monotonic(), None, ""
    try:
        ran = subprocess.run(
            [*command, *shared_options(part.options)], cwd=ROOT, capture_output=True, text=True,
            timeout=max(0.1, part.left()), check=False,
        )  # fmt: skip
        said = ran.stdout
        if ran.returncode:
            error = f"exit code {ran.returncode}: {ran.stderr.strip()[-300:]}"
    except subprocess.TimeoutExpired as late:
        said = (late.stdout or b"").decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        error = f"not done after {time.monotonic() - began:.0f} s"
    rows = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    if error is None and len(rows) < count:
        error = f"{count - len(rows)} of {count} calls are missing"
    ended = {"key": family, "calls": len(rows), "s": round(time.monotonic() - began, 2)}
    return [*rows, ended if error is None else ended | {"error": error}]


def run(part: Part) -> bool:
    """Check the families that are not in the results yet.

    Raises:
        AssertionError: one is wrong.
    """
    tma = bool(roofline.device(arch(part.device))["tma"])
    waiting = {f: calls for f, calls in families(part.rehearsal, tma).items() if not part.results.has(f)}
    with ThreadPoolExecutor(min(len(waiting) or 1, os.cpu_count() or 1)) as pool:
        jobs = [pool.submit(check_in_a_process, part, family, len(calls)) for family, calls in waiting.items()]
        for job in as_completed(jobs):
            part.results.add(*job.result())
    bad = [row for row in part.results.rows if {"error", "refused"} & row.keys()]
    for row in bad:
        print(f"smoke: {row['key']}: {row.get('refused') or row.get('error')}")
    print(f"smoke: {sum('case' in row for row in part.results.rows)} calls of all families, {len(bad)} wrong")
    assert not bad, f"{len(bad)} wrong"
    return True


def main_of_a_family(family: str, out: Path, rehearse: bool, no_tma: bool) -> int:
    """Print a row for each call of one family."""
    device = prepare(out, rehearse, no_tma)
    if device is None:
        return NO_DEVICE
    torch.set_float32_matmul_precision("high")
    for case in families(rehearse, tma=True)[family]:
        print(json.dumps(check(family, case, device)), flush=True)
    return FINISHED


if __name__ == "__main__":
    if "--family" in sys.argv:
        options = parser(__doc__)
        options.add_argument("--family", required=True)
        given = options.parse_args()
        sys.exit(main_of_a_family(given.family, given.out, given.rehearse, given.no_tma))
    sys.exit(main("smoke", __doc__, run))
