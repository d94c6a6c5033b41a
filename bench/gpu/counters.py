"""What the hardware counts in one launch: the forward at blocks of 16, by Nsight Compute where the program exists.

Sectors a request says how well the gather from the L2 cache uses its 128-byte lines: four are all of one.
"""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
import time

from bench.gpu.contestants import sparsekern_gpu
from bench.gpu.part import FAILED, FINISHED, MIXED, NO_DEVICE, parser, prepare, shared_options
from bench.gpu.results import ROOT, circumstances, other_results, write_json
from bench.gpu.scene import Case, make_scene

SECTORS, REQUESTS = (f"lts__t_{what}_srcunit_tex_op_read.sum" for what in ("sectors", "requests"))
METRICS = (SECTORS, REQUESTS, "gpu__time_duration.sum")
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "WarpStateStats", "Occupancy")
LAUNCHES = 3
"""The last one is looked at."""

CASE = Case("fwd", "bf16", 8192, 4096, 4096, 16, 0.9)
REHEARSED = Case("fwd", "fp16", 64, 64, 64, 16, 0.5)


def command_for(program: str, wanted: list[str]) -> list[str]:
    """Return the beginning of the command; the clocks are left as they are."""
    return [
        program, "--csv", "--clock-control", "none", "--kernel-name", "multiply_kernel",
        "--launch-skip", str(LAUNCHES - 1), "--launch-count", "1", *wanted,
    ]  # fmt: skip


def counted(output: str) -> dict[str, float]:
    """Return the numbers of a report in CSV by their names; what is no number is left out."""
    lines = [line for line in output.splitlines() if line.startswith('"')]
    found: dict[str, float] = {}
    for row in csv.DictReader(lines):
        try:
            found[f"{row['Metric Name']} [{row['Metric Unit']}]"] = float(row["Metric Value"].replace(",", ""))
        except (KeyError, TypeError, ValueError):
            continue
    return found


def sectors_a_request(found: dict[str, float]) -> float | None:
    """Return sectors read from the L2 cache a request, if both were counted."""
    by_name = {name.split(" [")[0]: number for name, number in found.items()}
    return by_name[SECTORS] / by_name[REQUESTS] if by_name.get(REQUESTS) and SECTORS in by_name else None


def main() -> int:
    """Write ``counters.json``; with ``--inside`` be the program that is looked at."""
    options = parser(__doc__)
    options.add_argument("--inside", action="store_true", help="launch the kernel, nothing else")
    given = options.parse_args()
    began = time.monotonic()
    device = prepare(given.out, given.rehearse, given.no_tma)
    if device is None:
        print("counters: there is no GPU that PyTorch can use")
        return NO_DEVICE
    if given.inside:
        run = sparsekern_gpu(make_scene(REHEARSED if given.rehearse else CASE, device), "fwd").run
        for _ in range(LAUNCHES):
            run()
        return FINISHED
    row = circumstances("counters", given.rehearse)
    if said := other_results(given.out, row):
        print(f"error: {said}", file=sys.stderr)
        return MIXED
    inside = [sys.executable, "-m", "bench.gpu.counters", "--inside", "--out", str(given.out), *shared_options(given)]
    program = shutil.which("ncu")
    # A name that this version does not know makes it refuse them all: the second try asks for sections only.
    sections = [word for section in SECTIONS for word in ("--section", section)]
    tries = [["--metrics", ",".join(METRICS), *sections], sections]
    commands = [inside] if program is None else [[*command_for(program, wanted), *inside] for wanted in tries]
    for command in commands:
        try:
            left = max(1.0, given.seconds - (time.monotonic() - began))
            ran = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=left)
        except subprocess.TimeoutExpired:
            row |= {"error": f"not done in {given.seconds:.0f} s"}
            break
        found = counted(ran.stdout)
        row |= {"code": ran.returncode, "counted": found, "sectors_a_request": sectors_a_request(found)}
        if found or program is None:
            break
        row |= {"output": (ran.stdout + ran.stderr)[-3000:]}
    if program is None:
        row |= {"error": "ncu is not installed; the launches were made without it"}
    elif not row.get("counted"):
        row.setdefault("error", "ncu counted nothing here")
    write_json(given.out / "counters.json", row)
    print(f"counters: {row.get('error') or str(len(row['counted'])) + ' numbers'}")
    return FINISHED if program is not None or row.get("code") == 0 else FAILED


if __name__ == "__main__":
    sys.exit(main())
