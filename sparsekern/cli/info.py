"""``sparsekern info``: versions, devices, and which kernels run here, or why not."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import sparsekern
from sparsekern.cli.shell import say
from sparsekern.kernels.cpu.library import load
from sparsekern.lab.bench.request import usable_cores
from sparsekern.lab.report.tables import count
from sparsekern.ops.backends import BACKENDS, DEVICE_TYPES

BLOCK = (32, 32)
"""What a backend is asked about, in float32."""


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say which versions, devices and kernels there are, and why a fast path is not taken.

    Worth a look after installing, and worth pasting into a bug report.
    """
    found = {"versions": _versions(), "devices": _devices(), "backends": {name: _live(name) for name in BACKENDS}}
    say(json.dumps(found) if as_json else _as_text(found))


def _versions() -> dict[str, str | None]:
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    return {
        "sparsekern": sparsekern.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
    }


def _devices() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": {"model": cpu_model(), "cores": usable_cores(), "torch_threads": torch.get_num_threads()},
        "gpus": [{"name": gpu.name, "bytes": gpu.total_memory} for gpu in gpus],
    }


def cpu_model() -> str:
    """Return the name of the processor, on Linux as it says itself; elsewhere what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """Return the name of the processor or the GPU."""
    return cpu_model() if device.type == "cpu" else torch.cuda.get_device_name(device)


def _live(name: str) -> dict[str, Any]:
    """Return whether a backend runs float32 in blocks of 32 on its device, and by what path or why not."""
    device = torch.device(DEVICE_TYPES.get(name, "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        return {"live": False, "detail": "PyTorch finds no NVIDIA GPU here"}
    try:
        reason = BACKENDS[name].why_not("linear", device, torch.float32, BLOCK)
    except (ValueError, RuntimeError) as error:  # SPARSEKERN_CPU asks for what cannot be had
        reason = str(error)
    return {"live": reason is None, "detail": _path(name) if reason is None else reason}


def _path(name: str) -> str:
    """Return in words what a backend that is live runs on."""
    library = load()[0] if name == "cpu" else None
    if library is not None:
        openmp = "OpenMP" if library.sk_openmp() else "one thread: built without OpenMP"
        return f"{load()[1]} (native library, {openmp})"
    return "Triton" if name == "gpu" else "plain PyTorch, on every device"


def _as_text(found: dict[str, Any]) -> str:
    cpu, gpus = found["devices"]["cpu"], found["devices"]["gpus"]
    lines = [f"{name:<12}{number or 'not installed'}" for name, number in found["versions"].items()]
    threads = count(cpu["torch_threads"], "thread")
    lines += ["", f"{'CPU':<12}{cpu['model']}, {cpu['cores']} cores, PyTorch uses {threads}"]
    lines += [f"{'GPU':<12}{gpu['name']}, {gpu['bytes'] / 2**30:.0f} GiB" for gpu in gpus] or [f"{'GPU':<12}none"]
    lines += ["", f"kernels for float32 in blocks of {BLOCK[0]}, fastest first"]
    for name, state in found["backends"].items():
        lines.append(f"{name:<12}{state['detail'] if state['live'] else 'no: ' + state['detail']}")
    return "\n".join(lines)
