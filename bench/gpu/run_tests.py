"""The tests of the GPU kernels, in all dtypes: on the GPU where there is one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time

import torch

from bench.gpu.part import Part, main
from bench.gpu.record_tests import FILE, WITH
from bench.gpu.results import ROOT, Row, read_rows

REHEARSED = ("tests/kernels/gpu/test_config.py", "tests/kernels/gpu/test_tables.py", "tests/kernels/test_contract.py")
"""The first that exists: the rehearsal is about the bookkeeping, not about the kernels."""

NO_GPU = ("test_gpu_code.py", "test_gpu_mutations.py", "test_gpu_conv2d_mutations.py")
"""Tests that a GPU adds nothing to: they compile for any device, or need Triton's interpreter."""

WORKERS = 12
"""Most of the time is compiling, one core each."""


def targets(rehearsal: bool) -> list[str]:
    """Return the files and folders of tests, relative to the checkout."""
    if rehearsal:
        return [next(path for path in REHEARSED if (ROOT / path).is_file())]
    found = [path for path in ("tests/kernels/gpu",) if (ROOT / path).exists()]
    return found + sorted(
        str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_gpu_*.py") if path.name not in NO_GPU
    )


def outcomes(rows: list[Row]) -> dict[str, Row]:
    """Return the last row of each test: one that failed may have passed the next time."""
    return {row["key"]: row for row in rows if "outcome" in row}


def run(part: Part) -> bool:
    """Run the tests that have not passed yet; return whether all have.

    Raises:
        AssertionError: a test failed.
    """
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "bench.gpu.record_tests", "-o", "addopts="]
    command += ["--import-mode=importlib", "--strict-markers", "--tb=short", "-p", "no:cacheprovider"]
    workers = min(WORKERS, 3 * (os.cpu_count() or 1) // 4)
    if importlib.util.find_spec("xdist") and workers > 1 and not part.rehearsal:
        command += ["-n", str(workers)]
    wanted = targets(part.rehearsal)
    assert wanted, "there are no tests of the GPU kernels"
    command += wanted
    began = time.monotonic()
    environment = os.environ | {FILE: str(part.results.path.resolve()), WITH: json.dumps(part.results.common)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    try:
        code = process.wait(max(1.0, part.left()))
    except subprocess.TimeoutExpired:
        code = None
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    last = outcomes(read_rows(part.results.path))
    counts = {kind: sum(row["outcome"] == kind for row in last.values()) for kind in ("passed", "failed", "skipped")}
    gpu = None if part.rehearsal else torch.cuda.get_device_name()
    part.results.add({"key": "summary", "counts": counts, "code": code, "gpu": gpu, "s": time.monotonic() - began})
    print(f"tests: {counts}")
    assert counts["failed"] == 0 and code in (0, 5, None), f"{counts['failed']} tests failed, pytest says {code}"
    return code is not None


if __name__ == "__main__":
    sys.exit(main("tests", __doc__, run))
