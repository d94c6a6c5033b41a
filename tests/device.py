"""Where the tests of Triton kernels run: on the GPU, or, where there is none, in Triton's interpreter on the CPU.

``tests/conftest.py`` decides, before anything imports Triton; this module only reads what it decided.
"""

from __future__ import annotations

import mmap
import os
from typing import Any

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

on_gpu_only = pytest.mark.skipif(INTERPRETED, reason="needs a GPU: the interpreter's tl.dot ignores input_precision")
interpreted_only = pytest.mark.skipif(not INTERPRETED, reason="looks into Triton's interpreter")

BFLOAT16 = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(INTERPRETED, reason="the interpreter of Triton 3.7.1 computes tl.dot of bfloat16 wrongly"),
)
DTYPES = (torch.float32, torch.float16, BFLOAT16)
"""Of a ``parametrize``: what the kernels offer and this device computes."""


def in_dtypes(*cases: Any) -> list[tuple[Any, Any]]:
    """Cases with a dtype each: on a GPU with each one, in the interpreter, to which dtypes are alike, by turns."""
    if INTERPRETED:
        return [(case, DTYPES[number % 2]) for number, case in enumerate(cases)]
    return [(case, dtype) for case in cases for dtype in (torch.float32, torch.float16, torch.bfloat16)]


NO_RESERVE = 0x4000
"""Linux's MAP_NORESERVE, which ``mmap`` names from Python 3.13 on."""


def huge(elements: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """Return zeros that take memory only where they are touched (on a GPU everywhere)."""
    if not INTERPRETED:
        return torch.zeros(elements, dtype=dtype, device=DEVICE)
    lazily = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    return torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize, flags=lazily), dtype=dtype)
