"""Plain PyTorch: any device, any floating dtype, any block, in a bounded scratch. The backend to read first."""

from __future__ import annotations

import torch
from sparsekern.kernels.contract import ConvShape, Index, backward_in_two_calls, conv2d_backward_in_two_calls
from sparsekern.kernels.eager.chunks import SCRATCH_BYTES
from sparsekern.kernels.eager.conv2d import conv2d_dvalues, conv2d_dx, conv2d_fwd
from sparsekern.kernels.eager.conv2d_scores import conv2d_all_block_norms, conv2d_block_norms, conv2d_sketch
from sparsekern.kernels.eager.linear import dvalues, dx, fwd
from sparsekern.kernels.eager.scores import all_block_norms, block_norms, sketch
from torch import Tensor

__all__ = [
    "SCRATCH_BYTES",
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
    "sketch",
    "why_not",
]


def why_not(op: str, device: torch.device, dtype: torch.dtype, block: tuple[int, int]) -> str | None:
    """Return None: there is nothing that these kernels cannot run."""
    return None


def backward(dy: Tensor, x: Tensor, values: Tensor, index: Index) -> tuple[Tensor, Tensor]:
    """Return ``dx, dvalues``; see :meth:`sparsekern.kernels.contract.Backend.backward`."""
    return backward_in_two_calls(dx, dvalues, dy, x, values, index)


def conv2d_backward(dy: Tensor, x: Tensor, values: Tensor, index: Index, shape: ConvShape) -> tuple[Tensor, Tensor]:
    """Return ``dx, dvalues``; see :meth:`sparsekern.kernels.contract.Backend.conv2d_backward`."""
    return conv2d_backward_in_two_calls(conv2d_dx, conv2d_dvalues, dy, x, values, index, shape)
