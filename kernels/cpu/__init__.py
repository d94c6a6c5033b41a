"""Native CPU kernels: C++ micro-kernels in ``csrc``, compiled at installation, once per instruction set.

Blocks of 16, 32, 64 and 128 and their rectangles, and 1x1; float32, bfloat16 and float16, with sums in float32. The
result is the same to the bit for any number of threads. A processor's own bfloat16 instructions (AMX, AVX512_BF16,
ARM's bfmmla) take its subnormal numbers for zero.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import torch
from sparsekern.kernels.contract import Geometry, Kernels
from sparsekern.kernels.cpu import products
from sparsekern.kernels.cpu.library import DTYPES, load, release_scratch, scratch_bytes

__all__ = ["keep_freed_memory", "kernels", "products", "release_scratch", "scratch_bytes", "why_not"]

SIDES = (16, 32, 64, 128)
CPU = torch.device("cpu")


def why_not(op: str, device: torch.device, dtype: torch.dtype, block: tuple[int, int]) -> str | None:
    """Return None if these kernels can run ``op`` on such tensors, otherwise the reason."""
    if op not in ("linear", "conv2d"):
        return f"it has no kernels for {op}"
    if device != CPU and device.type != "cpu":  # the name of the type costs five times as much
        return f"the tensors are on {device.type}"
    if dtype not in DTYPES:
        return f"the dtype is {dtype}; it has {', '.join(str(d) for d in DTYPES)}"
    if block != (1, 1) and not (block[0] in SIDES and block[1] in SIDES):
        return f"blocks are {block[0]}x{block[1]}; it has 1x1 and sides {', '.join(map(str, SIDES))}"
    library, reason = load()
    return None if library is not None else reason


def kernels(geometry: Geometry) -> Kernels[Any]:
    """Return the module whose kernels run this geometry: one for both."""
    return products


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # <malloc.h>
MOST_INT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Keep the memory of freed CPU tensors in this process for the next ones, up to 2 GiB at the end of its heap.

    By default glibc returns the memory of large freed tensors to the system (that of 32 MiB and more every time), and
    the system clears it again, page by page, for the next tensors. Some steps of a sparse layer whose kernels take
    5.4 ms took 8.4 ms for this reason; a dense layer of the same size loses as many milliseconds, of 85. Allocators
    such as jemalloc and tcmalloc, which PyTorch recommends for CPUs, keep memory anyway; this function is for glibc's.
    It affects the whole process except allocations of more than 64 MiB on threads other than the first, so programs
    should call it early: ``sparsekern train``, ``bench.race`` and ``bench.end_to_end`` do.

    Returns:
        Whether glibc accepted the settings; False on other systems.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # Without separate mappings, all of it lies in the heap; the other is 128 KiB of free memory at its end.
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, MOST_INT))
