"""Native kernels for the CPU: C++ micro-kernels in ``csrc``, compiled at installation once per instruction set.

Blocks of 16, 32, 64 and 128 and their rectangles, and 1x1; float32, bfloat16 and float16, with sums in float32. The
result is the same to the bit for any number of threads. A processor's own bfloat16 instructions (AMX, AVX512_BF16)
take its subnormal numbers for zero.
"""

from __future__ import annotations

import torch
from sparsekern.kernels.cpu.conv2d import conv2d_backward, conv2d_dvalues, conv2d_dx, conv2d_fwd
from sparsekern.kernels.cpu.conv2d_scores import conv2d_all_block_norms, conv2d_block_norms, conv2d_sketch
from sparsekern.kernels.cpu.library import DTYPES, load, release_scratch, scratch_bytes
from sparsekern.kernels.cpu.linear import backward, dvalues, dx, fwd
from sparsekern.kernels.cpu.scores import all_block_norms, block_norms, sketch

__all__ = [
    "all_block_norms",
    "backward",
    "block_norms",
    "conv2d_all_block_norms",
    "conv2d_backward",
    "conv2d_block_norms",
    "conv2d_dvalues",
    "conv2d_dx",
    "conv2d_fwd",
    "conv2d_sketch",
    "dvalues",
    "dx",
    "fwd",
    "release_scratch",
    "scratch_bytes",
    "sketch",
    "why_not",
]

OPS = ("linear", "conv2d")
SIDES = (16, 32, 64, 128)
CPU = torch.device("cpu")


def why_not(op: str, device: torch.device, dtype: torch.dtype, block: tuple[int, int]) -> str | None:
    """Return None when these kernels can run ``op`` so, else the reason."""
    if op not in OPS:
        return f"it has no kernels for {op}"
    if device != CPU and device.type != "cpu":  # the name of the type costs five times as much
        return f"the tensors are on {device.type}"
    if dtype not in DTYPES:
        return f"the dtype is {dtype}; it has {', '.join(str(d) for d in DTYPES)}"
    if block != (1, 1) and not (block[0] in SIDES and block[1] in SIDES):
        return f"blocks are {block[0]}x{block[1]}; it has 1x1 and sides {', '.join(map(str, SIDES))}"
    library, reason = load()
    return None if library is not None else reason
