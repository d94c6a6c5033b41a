"""Kernels in plain PyTorch, for any device, floating dtype and block, with bounded scratch memory. Read these first."""

from __future__ import annotations

from typing import Any

import torch
from sparsekern.kernels.contract import ConvShape, Geometry, Kernels
from sparsekern.kernels.eager import conv2d, linear
from sparsekern.kernels.eager.chunks import SCRATCH_BYTES

__all__ = ["SCRATCH_BYTES", "conv2d", "kernels", "linear", "why_not"]


def why_not(op: str, device: torch.device, dtype: torch.dtype, block: tuple[int, int]) -> str | None:
    """Return None: these kernels run everything."""
    return None


def kernels(geometry: Geometry) -> Kernels[Any]:
    """Return the module whose kernels run this geometry."""
    return conv2d if isinstance(geometry, ConvShape) else linear
