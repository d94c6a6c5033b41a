"""Triton kernels, for NVIDIA GPUs from sm_80 on. The modules beside this one need Triton; this one does not.

Under ``TRITON_INTERPRET=1``, set before anything imports Triton (``import sparsekern`` does, through PyTorch), they run
on CPU tensors, slowly, when asked for by name: that is how they are tested where there is no GPU.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec

import torch
from sparsekern.kernels.contract import ConvShape, Index, backward_in_two_calls, conv2d_backward_in_two_calls
from sparsekern.kernels.gpu.launch import interpreted
from torch import Tensor

SIDES = (16, 32, 64, 128)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

__all__ = [
    "DTYPES",
    "SIDES",
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
    """Return None when these kernels can run ``op`` so, else the reason."""
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


def fwd(x: Tensor, values: Tensor, bias: Tensor | None, index: Index, out_features: int) -> Tensor:
    """Return ``y (T, O)``; see :meth:`sparsekern.kernels.contract.Backend.fwd`."""
    from sparsekern.kernels.gpu import linear

    return linear.fwd(x, values, bias, index, out_features)


def dx(dy: Tensor, values: Tensor, index: Index, in_features: int) -> Tensor:
    """Return ``dx (T, I)``; see :meth:`sparsekern.kernels.contract.Backend.dx`."""
    from sparsekern.kernels.gpu import linear

    return linear.dx(dy, values, index, in_features)


def dvalues(dy: Tensor, x: Tensor, index: Index, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return ``(Z, bo, bi)``; see :meth:`sparsekern.kernels.contract.Backend.dvalues`."""
    from sparsekern.kernels.gpu import linear

    return linear.dvalues(dy, x, index, block, dtype)


def backward(dy: Tensor, x: Tensor, values: Tensor, index: Index) -> tuple[Tensor, Tensor]:
    """Return ``dx, dvalues``; see :meth:`sparsekern.kernels.contract.Backend.backward`."""
    return backward_in_two_calls(dx, dvalues, dy, x, values, index)


def block_norms(dy: Tensor, x: Tensor, row: Tensor, col: Tensor, block: tuple[int, int]) -> Tensor:
    """Return the norms ``(K,)`` of chosen blocks; see :meth:`sparsekern.kernels.contract.Backend.block_norms`."""
    from sparsekern.kernels.gpu import scores

    return scores.block_norms(dy, x, row, col, block)


def all_block_norms(dy: Tensor, x: Tensor, block: tuple[int, int]) -> Tensor:
    """Return the norms ``(R, C)`` of all blocks; see :meth:`sparsekern.kernels.contract.Backend.all_block_norms`."""
    from sparsekern.kernels.gpu import scores

    return scores.all_block_norms(dy, x, block)


def sketch(dy: Tensor, x: Tensor, u: Tensor, v: Tensor, block: tuple[int, int]) -> Tensor:
    """Return ``(r, R, C)``; see :meth:`sparsekern.kernels.contract.Backend.sketch`."""
    from sparsekern.kernels.gpu import scores

    return scores.sketch(dy, x, u, v, block)


def conv2d_fwd(x: Tensor, values: Tensor, bias: Tensor | None, index: Index, shape: ConvShape) -> Tensor:
    """Return ``y (N, Cout, Ho, Wo)``; see :meth:`sparsekern.kernels.contract.Backend.conv2d_fwd`."""
    from sparsekern.kernels.gpu import conv2d

    return conv2d.conv2d_fwd(x, values, bias, index, shape)


def conv2d_dx(dy: Tensor, values: Tensor, index: Index, shape: ConvShape, size: tuple[int, int]) -> Tensor:
    """Return ``dx (N, Cin, H, W)``; see :meth:`sparsekern.kernels.contract.Backend.conv2d_dx`."""
    from sparsekern.kernels.gpu import conv2d

    return conv2d.conv2d_dx(dy, values, index, shape, size)


def conv2d_dvalues(
    dy: Tensor, x: Tensor, index: Index, block: tuple[int, int], shape: ConvShape, dtype: torch.dtype
) -> Tensor:
    """Return ``(Z, bo, bi)``; see :meth:`sparsekern.kernels.contract.Backend.conv2d_dvalues`."""
    from sparsekern.kernels.gpu import conv2d

    return conv2d.conv2d_dvalues(dy, x, index, block, shape, dtype)


def conv2d_backward(dy: Tensor, x: Tensor, values: Tensor, index: Index, shape: ConvShape) -> tuple[Tensor, Tensor]:
    """Return ``dx, dvalues``; see :meth:`sparsekern.kernels.contract.Backend.conv2d_backward`."""
    return conv2d_backward_in_two_calls(conv2d_dx, conv2d_dvalues, dy, x, values, index, shape)


def conv2d_block_norms(
    dy: Tensor, x: Tensor, row: Tensor, col: Tensor, block: tuple[int, int], shape: ConvShape
) -> Tensor:
    """Return the norms ``(K,)``; see :meth:`sparsekern.kernels.contract.Backend.conv2d_block_norms`."""
    from sparsekern.kernels.gpu import conv2d_scores

    return conv2d_scores.conv2d_block_norms(dy, x, row, col, block, shape)


def conv2d_all_block_norms(dy: Tensor, x: Tensor, block: tuple[int, int], shape: ConvShape) -> Tensor:
    """Return the norms ``(R, C)``; see :meth:`sparsekern.kernels.contract.Backend.conv2d_all_block_norms`."""
    from sparsekern.kernels.gpu import conv2d_scores

    return conv2d_scores.conv2d_all_block_norms(dy, x, block, shape)


def conv2d_sketch(dy: Tensor, x: Tensor, u: Tensor, v: Tensor, block: tuple[int, int], shape: ConvShape) -> Tensor:
    """Return ``(r, R, C)``; see :meth:`sparsekern.kernels.contract.Backend.conv2d_sketch`."""
    from sparsekern.kernels.gpu import conv2d_scores

    return conv2d_scores.conv2d_sketch(dy, x, u, v, block, shape)
