"""What all parts of a run have in common: the command line, the budget, the device, the exit code."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from sparsekern.kernels.gpu.config import package_data
from sparsekern.kernels.gpu.launch import interpreted

from bench.gpu.results import ROOT, Results, circumstances, delete, other_results
from sparsekern.analysis.clock import DeviceLost

FINISHED, FAILED, NO_DEVICE, PARTLY, LOST, MIXED = 0, 1, 2, 3, 4, 5
"""Exit codes: all measured | something is wrong | there is no GPU | the budget is over | run again, the GPU's context
is gone | there are results of another device, commit or version."""


@dataclass
class Part:
    """One part of a run, as its functions see it."""

    out: Path
    rehearsal: bool
    device: torch.device
    results: Results
    ends: float
    options: argparse.Namespace

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.ends - time.monotonic()

    def over(self, needed: float = 0.0) -> bool:
        """Return whether fewer than ``needed`` seconds are left."""
        return self.left() <= needed


def say_what_failed(error: Exception) -> str:
    """Return an error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def parser(about: str | None) -> argparse.ArgumentParser:
    """Return the options of every part."""
    options = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=ROOT / "bench" / "out", help="folder of the results")
    options.add_argument("--seconds", type=float, default=120.0, help="budget; the next run continues after it")
    options.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU; the times mean nothing")
    options.add_argument("--no-tma", action="store_true", help="without the copy engine of Hopper and Blackwell")
    options.add_argument("--force", action="store_true", help="delete what this part has written, and begin anew")
    return options


def shared_options(given: argparse.Namespace) -> list[str]:
    """Return the options that a part hands on to the processes it starts."""
    return [*(["--rehearse"] if given.rehearse else []), *(["--no-tma"] if given.no_tma else [])]


def prepare(out: Path, rehearse: bool, no_tma: bool = False) -> torch.device | None:
    """Point the package at the table of this run and return the device, None if there is none.

    Args:
        out: folder of the results, and of the table.
        rehearse: on the CPU.
        no_tma: let no device have a copy engine, so that no configuration asks for it.

    Triton reads TRITON_INTERPRET when it is imported, and whoever imports sparsekern has imported it: the caller sets
    it, as gpu_run.sh does.
    """
    os.environ["SPARSEKERN_CACHE"] = str(out.resolve())  # the tuner writes there, the race reads it
    os.environ.setdefault("SPARSEKERN_AUTOTUNE", "offline")
    if no_tma:
        for name, constants in package_data("devices.json").items():
            if name != "about":
                constants["tma"] = False
    if rehearse:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None


def main(name: str, about: str | None, run: Callable[[Part], bool], argv: Sequence[str] | None = None) -> int:
    """Run a part and return its exit code.

    Args:
        name: of the part and its file.
        about: help text.
        run: does the work; returns whether all of it is done.
        argv: the command line.
    """
    began = time.monotonic()
    given = parser(about).parse_args(argv)
    device = prepare(given.out, given.rehearse, given.no_tma)
    if device is None:
        print(f"{name}: there is no GPU that PyTorch can use; --rehearse runs it on the CPU")
        return NO_DEVICE
    if interpreted() != given.rehearse:
        wanted = "must be 1" if given.rehearse else "must not be set"
        print(f"{name}: TRITON_INTERPRET {wanted} in the environment; gpu_run.sh sees to that")
        return FAILED
    if given.force:
        delete(given.out, name)
    here = circumstances(name, given.rehearse)
    if said := other_results(given.out, here):
        print(f"error: {said}", file=sys.stderr)
        return MIXED
    results = Results(given.out / f"{name}.jsonl", here)
    try:
        done = run(Part(given.out, given.rehearse, device, results, began + given.seconds, given))
    except DeviceLost as error:
        print(f"{name}: the GPU's context is lost ({error}); run again to go on")
        return LOST
    except Exception:
        traceback.print_exc()
        return FAILED
    else:
        if done:
            results.finish()
        return FINISHED if done else PARTLY
    finally:
        results.close()
