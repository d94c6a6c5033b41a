"""What becomes of the memory of freed tensors."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # <malloc.h>
MOST_INT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let this process keep the memory of freed CPU tensors for the next ones, up to 2 GiB at the end of its heap.

    Otherwise glibc gives memory back to the system when large tensors are freed, that of 32 MiB and more each time, and
    the next ones are cleared anew, page by page. Of the steps of a sparse layer whose kernels took 5.4 ms some took 8.4
    so; a dense layer of the same size loses as much, of 85. An allocator such as jemalloc or tcmalloc, which PyTorch
    recommends for CPUs, keeps memory anyway; this is for the C library's own. It holds for the whole process, but for
    allocations of more than 64 MiB on other threads than the first, so it is for programs to call, early on:
    ``sparsekern train``, ``bench.race`` and ``bench.end_to_end`` do.

    Returns:
        Whether glibc took it: False on other systems.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # Without separate mappings, all of it lies in the heap; the other is 128 KiB of free memory at its end.
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, MOST_INT))
