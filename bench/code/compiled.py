"""What is in a compiled kernel: matrix instructions, copies, buffers, spills, the length of its main loop.

Each is read where it cannot be mistaken: buffers in Triton's IR, instructions and copies in PTX, resources in the
header of the machine code, the loop in the machine code itself.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton

BINARIES = Path(triton.__file__).parent / "backends/nvidia/bin"

PRODUCTS = re.compile(r"HGMMA|HMMA|UTC\w*MMA")
"""Machine instructions of the tensor cores, from Ampere's to Blackwell's."""

SHAPES = {
    "wgmma": r"wgmma\.mma_async\.sync\.aligned\.(m\d+n\d+k\d+)",
    "mma.sync": r"mma\.sync\.aligned\.(m\d+n\d+k\d+)",
    "tcgen05": r"tcgen05\.mma\.cta_group::\d\.kind::(\w+)",
}
CP_ASYNC = r"cp\.async\.c[ag]\.shared\.global \[[^\]]*\], \[[^\]]*\], (0x[0-9a-f]+|\d+)"


def facts(kernel: Any) -> dict[str, Any]:
    """Return the columns of the table that come from the compiled code."""
    ptx, machine_code = kernel.asm["ptx"], _disassembled(kernel.asm["cubin"])
    products, copies = matrix_instructions(ptx), copy_widths(ptx)
    loop = main_loop(machine_code[1], PRODUCTS if products else re.compile("FFMA" if copies else "LDG"))
    return {
        "products": products,
        "copies": copies,
        **resources(machine_code[0]),
        "shared": kernel.metadata.shared,
        "buffers": buffers(kernel.asm["ttgir"]),
        "loop": len(loop),
    }


def matrix_instructions(ptx: str) -> dict[str, int]:
    """Return how often each matrix instruction is written, such as ``{"wgmma m64n32k16": 8}``."""
    found = Counter(f"{name} {shape}" for name, pattern in SHAPES.items() for shape in re.findall(pattern, ptx))
    return dict(sorted(found.items()))


def copy_widths(ptx: str) -> dict[str, int]:
    """Return how many asynchronous copies to shared memory there are: by bytes, and ``tma`` for the copy engine."""
    found = Counter(str(int(width, 0)) for width in re.findall(CP_ASYNC, ptx))
    tma = len(re.findall(r"cp\.async\.bulk\.tensor", ptx))
    return dict(sorted(found.items())) | ({"tma": tma} if tma else {})


def buffers(ttgir: str) -> int:
    """Return how many tiles of both operands the pipeline holds; 0 when it does not hold both."""
    stages = re.findall(r"local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x[a-z]+\d+,", ttgir)
    return min(map(int, stages)) if len(stages) > 1 else 0


def resources(usage: str) -> dict[str, int]:
    """Return registers and bytes spilled, from the output of ``cuobjdump --dump-resource-usage``.

    Raises:
        ValueError: they are not there.
    """
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    if found is None:
        raise ValueError(f"no resource usage in {usage!r}")
    registers, stack, local = map(int, found.groups())
    return {"registers": registers, "spills": stack + local}


def main_loop(sass: str, wanted: re.Pattern[str] = PRODUCTS) -> list[str]:
    """Return the shortest loop that has a wanted instruction, from a listing of ``nvdisasm -c``; [] when none has."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in sass.splitlines():
        if label := re.match(r"\s*\.(L_\w+):", line):
            labels[label.group(1)] = len(instructions)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            instructions.append(instruction.group(1))
    loops = []
    for end, instruction in enumerate(instructions):
        branch = re.search(r"\bBRA\b.*`\(\.(L_\w+)\)", instruction)
        start = labels.get(branch.group(1), end + 1) if branch else end + 1
        if start <= end and any(wanted.search(text) for text in instructions[start : end + 1]):
            loops.append(instructions[start : end + 1])
    return min(loops, key=len, default=[])


def _disassembled(cubin: bytes) -> tuple[str, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = ([BINARIES / "cuobjdump", "--dump-resource-usage"], [BINARIES / "nvdisasm", "-c"])
        usage, sass = (subprocess.run([*c, file.name], capture_output=True, text=True, check=True) for c in commands)
    return usage.stdout, sass.stdout
