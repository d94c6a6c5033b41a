"""Functions shared by the launchers in this folder: aligned rows, the precision of float32, the device."""

from __future__ import annotations

import functools
import os
from contextlib import AbstractContextManager

import torch
from torch import Tensor

INTERPRETER = "sm_90"
"""The architecture whose configurations Triton's interpreter runs."""

MOST_PIXELS = 2**31 - 2**16
"""Pixels of a call of a convolution: their numbers are int32, also those of a tile that sticks out."""


def interpreted() -> bool:
    """Return whether Triton runs as an interpreter on CPU tensors (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "yes", "y")


@functools.cache
def arch(device: torch.device) -> str:
    """Return the architecture of a device, such as ``sm_90``."""
    if device.type == "cpu":
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{10 * major + minor}"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of a device."""
    return 132 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def dot_precision(dtype: torch.dtype) -> str:
    """Return how ``tl.dot`` multiplies float32: ``tf32`` or ``ieee``, as torch's own settings say.

    They are ``torch.set_float32_matmul_precision`` and ``torch.backends.cuda.matmul.fp32_precision``.
    """
    if dtype != torch.float32:
        return "tf32"  # means nothing there; one word, so that nothing is compiled twice
    # Not allow_tf32: reading it raises once a user has set fp32_precision.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def alignment(dtype: torch.dtype) -> int:
    """Return how many elements are 16 bytes, the widest copy."""
    return 16 // dtype.itemsize


def aligned_rows(x: Tensor) -> Tensor:
    """Return ``x (T, F)`` such that each row is contiguous and starts at, and is a multiple of, 16 bytes.

    That is x itself for most; else a copy, filled up with zeros: one pass over x, where a kernel makes one for each
    block row and would read it element by element. An expanded row (stride 0) needs no copy.
    """
    align = alignment(x.dtype)
    tokens, features = x.shape
    missing = -features % align
    stride = x.stride(0) if tokens > 1 else 0
    near = stride < 2**31  # kernels take strides as int32, and form products with them in int64
    if x.stride(1) == 1 and missing == 0 and stride % align == 0 and near and x.data_ptr() % 16 == 0:
        return x
    rows = x.new_empty(tokens, features + missing)
    rows[:, :features] = x
    rows[:, features:] = 0
    return rows


def aligned(values: Tensor) -> Tensor:
    """Return a contiguous tensor that starts at a multiple of 16 bytes: itself for most, else a copy.

    A view into a flat parameter may start anywhere; from there no asynchronous copy is made, only loads of an element.
    """
    values = values.contiguous()
    return values if values.data_ptr() % 16 == 0 else values.clone()


def aligned_images(x: Tensor, groups: int) -> Tensor:
    """Return ``x (N, C, H, W)``, channels last, as ``(N, H, W, groups, F)``: contiguous, each group 16-byte aligned.

    That is x itself for most; else a copy, the channels of each group filled up with zeros to a multiple of 16 bytes.

    Raises:
        NotImplementedError: x has so many pixels that their numbers are no int32.
    """
    align, pixels = alignment(x.dtype), x.shape[0] * x.shape[2] * x.shape[3]
    if pixels >= MOST_PIXELS:
        raise NotImplementedError(f"{pixels} pixels in a call; the GPU kernels count fewer than {MOST_PIXELS}")
    images: Tensor = x.permute(0, 2, 3, 1).unflatten(3, (groups, -1))
    features = images.shape[4]
    missing = -features % align
    if images.is_contiguous() and missing == 0 and x.data_ptr() % 16 == 0:
        return images
    filled = x.new_empty(*images.shape[:4], features + missing)
    filled[..., :features] = images
    filled[..., features:] = 0
    return filled


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Return a context in which Triton launches on the device of x, which need not be the current one."""
    return torch.cuda.device_of(x)


def on_default_stream(device: torch.device) -> bool:
    """Return whether a device works on its default stream now; a CPU always does."""
    return device.type == "cpu" or torch.cuda.current_stream(device) == torch.cuda.default_stream(device)
