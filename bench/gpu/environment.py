"""On what everything else was measured. Reads, and changes nothing: no clock, no power limit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from bench.gpu.part import FINISHED, MIXED, NO_DEVICE, parser, prepare
from bench.gpu.results import Row, circumstances, delete, other_results, write_json

PACKAGES = ("torch", "triton", "numpy", "pytest", "pytest-xdist", "stanford-stk", "blksprs", "torchao")
QUERY = "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"


def environment(rehearsal: bool) -> Row:
    """Return the device and the versions."""
    row = circumstances("environment", rehearsal) | {
        "processors": os.cpu_count(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "nvidia-smi": _nvidia_smi(),
        "compute-sanitizer": shutil.which("compute-sanitizer"),
        "ncu": shutil.which("ncu"),
    }
    if not rehearsal:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        row |= {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": properties.total_memory / 2**30,
            "l2_mib": getattr(properties, "L2_cache_size", 0) / 2**20,
        }
    return row


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _nvidia_smi() -> dict[str, str] | str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "there is no nvidia-smi"
    command = [program, f"--query-gpu={QUERY}", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi failed: {error}"
    return dict(zip(QUERY.split(","), (f.strip() for f in found.splitlines()[0].split(",")), strict=False))


def main() -> int:
    """Write ``environment.json``, unless the folder holds results that do not belong with this device and commit."""
    options = parser(__doc__)
    options.add_argument("--parts", type=str.split, default=[], help="with --force, the parts whose results go first")
    given = options.parse_args()
    if prepare(given.out, given.rehearse) is None:
        print("environment: there is no GPU that PyTorch can use")
        return NO_DEVICE
    row = environment(given.rehearse)
    for part in given.parts if given.force else ():
        delete(given.out, part)
    if said := other_results(given.out, row):
        print(f"error: {said}", file=sys.stderr)
        return MIXED
    write_json(given.out / "environment.json", row)
    print("environment: " + ", ".join(f"{k} {row.get(k)}" for k in ("device", "multiprocessors", "torch", "triton")))
    return FINISHED


if __name__ == "__main__":
    sys.exit(main())
