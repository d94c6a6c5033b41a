"""Triton kernels, for NVIDIA GPUs from sm_80 on. The modules beside this one need Triton; this one does not.

Under ``TRITON_INTERPRET=1``, set before anything imports Triton (``import sparsekern`` does, through PyTorch), they run
on CPU tensors, slowly, when asked for by name: that is how they are tested where there is no GPU.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec
from typing import Any

import torch
from sparsekern.kernels.contract import ConvShape, Geometry, Kernels
from sparsekern.kernels.gpu.launch import interpreted

SIDES = (16, 32, 64, 128)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

__all__ = ["DTYPES", "SIDES", "kernels", "why_not"]


def why_not(op: str, device: torch.device, dtype: torch.dtype, block: tuple[int, int]) -> str | None:
    """Return None if these kernels can run ``op`` on such tensors, otherwise the reason."""
    if op not in ("linear", "conv2d"):
        return f"it has no kernels for {op}"
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return f"the tensors are on {device.type}; it needs an NVIDIA GPU (or TRITON_INTERPRET=1, for tests)"
    if device.type == "cpu" and dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 wrongly"
    if dtype not in DTYPES:
        return f"the dtype is {dtype}; it has {', '.join(str(d) for d in DTYPES)}"
    if block[0] not in SIDES or block[1] not in SIDES:
        return f"blocks are {block[0]}x{block[1]}; it has sides {', '.join(map(str, SIDES))}"
    return _why_not_here(device)


@functools.cache
def _why_not_here(device: torch.device) -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    if device.type == "cuda":
        if torch.version.hip is not None:
            return "it was never run on ROCm"
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"{torch.cuda.get_device_name(device)} is sm_{major}{minor}; it needs sm_80 or newer"
    return None


def kernels(geometry: Geometry) -> Kernels[Any]:
    """Return the module whose kernels run this geometry. Triton is imported by the first call."""
    if isinstance(geometry, ConvShape):
        from sparsekern.kernels.gpu import conv2d

        return conv2d
    from sparsekern.kernels.gpu import linear

    return linear
