"""What the package would launch on a GPU that is not here: its own functions are called, and nothing is launched.

No signature is written down here. A function of ``sparsekern.kernels.gpu`` gets CPU tensors of a real size (their
memory is never touched), and Triton gets every launch with its true arguments, but as a warm-up for the asked
architecture: it specialises, compiles and stops there. So what is compiled is what a user's call would run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from typing import Any
from unittest.mock import patch

import torch
from sparsekern.kernels.contract import PADDING, ConvShape, Index, LinearShape
from sparsekern.kernels.gpu import conv2d, linear, roofline, tables
from sparsekern.kernels.gpu.config import Config, Multiply, Problem
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bench.code.cases import STREAMS, Case

TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "ieee": torch.float32}

TOKENS, FEW, FEATURES, DENSITY = 8192, 8, 4096, 0.1
"""The call: a layer of 4096 x 4096 with a tenth of its blocks stored, in training and in decoding."""

IMAGES, SIDE, CHANNELS = 32, 16, 512
"""The convolution: 3x3, padded, 512 to 512 channels on 16x16 pixels; stride 1."""


KERNELS = {
    "sum_splits": "sum_splits_kernel",
    "projection": "projection_kernel",
    "conv2d_projection": "conv2d_projection_kernel",
    "conv2d_lists": "lists_kernel",
    "conv2d_dx": "conv2d_multiply_kernel",
}
"""The function that a row is about, where a call launches several."""


def compiled(case: Case) -> tuple[Any, dict[str, Any], bool]:
    """Return what Triton compiled for a row, the configuration, and whether that is the default of such a call."""
    chosen: list[tuple[Config, bool]] = []

    def run(problem: Problem, launch: tables.Launch, exact: object) -> None:
        best = wanted = roofline.candidates(problem)[0]
        if isinstance(best, Multiply):  # without TMA: what is launched when rows are not as the copy engine wants them
            wanted = replace(best, tma=case.kernel.endswith("_tma"))
        chosen.append((wanted, wanted == best))
        launch(wanted)

    name = KERNELS.get(case.kernel)
    with _warm_ups_for(case.arch) as launched, patch.object(tables, "run", run):
        (_call_conv2d if case.kernel.startswith("conv2d_") else _call)(case)
    kernel = next(k for function, k in launched if name in (None, function))
    if case.kernel in STREAMS:
        return kernel, {}, True
    return kernel, asdict(chosen[0][0]), chosen[0][1]


def _call(case: Case) -> None:
    torch.backends.cuda.matmul.fp32_precision = "ieee" if case.dtype == "ieee" else "tf32"
    dtype, block = TORCH[case.dtype], (case.bo, case.bi)
    few = case.kernel.startswith("few")
    features = FEATURES // 16 if case.kernel in ("sum_splits", "projection") else FEATURES  # so few that it splits
    slots = int(features * features * DENSITY) // (case.bo * case.bi) + 1
    x = torch.empty(FEW if few else TOKENS, features, dtype=dtype)
    values = torch.empty(slots, *block, dtype=dtype)
    index = _index(features // case.bo, features // case.bi, slots)
    operation, square = case.kernel.removeprefix("few_").removesuffix("_tma"), LinearShape(features, features)
    if operation == "fwd":
        linear.fwd(x, values, torch.empty(features, dtype=dtype), index, square)
    elif operation == "dx":
        linear.dx(x, values, index, square)
    elif operation in ("dvalues", "sum_splits"):
        linear.dvalues(x, x, index, block, square, dtype)
    elif operation == "block_norms":
        linear.block_norms(x, x, index.row_col[:slots], index.row_col[:slots], block, square)
    elif operation == "all_block_norms":
        linear.all_block_norms(x, x, block, square)
    else:
        directions = torch.empty(2, features)
        linear.sketch(x[:64], x[:64], directions, directions, block, square)


def _call_conv2d(case: Case) -> None:
    torch.backends.cuda.matmul.fp32_precision = "ieee" if case.dtype == "ieee" else "tf32"
    dtype, block, operation = TORCH[case.dtype], (case.bo, case.bi), case.kernel.removeprefix("conv2d_")
    shape = ConvShape(CHANNELS, CHANNELS, (3, 3), padding=(1, 1, 1, 1))
    cells = shape.taps * CHANNELS * CHANNELS // (case.bo * case.bi)
    slots = int(cells * DENSITY) + 1
    x = torch.empty(IMAGES, SIDE, SIDE, CHANNELS, dtype=dtype).permute(0, 3, 1, 2)
    values = torch.empty(slots, *block, dtype=dtype)
    index = _index(CHANNELS // case.bo, shape.taps * CHANNELS // case.bi, slots)
    if operation == "fwd":
        conv2d.fwd(x, values, torch.empty(CHANNELS, dtype=dtype), index, shape)
    elif operation in ("dx", "lists"):
        conv2d.dx(x, values, index, shape, (SIDE, SIDE))
    elif operation == "dvalues":
        conv2d.dvalues(x, x, index, block, shape, dtype)
    elif operation == "all_block_norms":
        conv2d.all_block_norms(x, x, block, shape)
    else:
        u, v = torch.empty(2, CHANNELS), torch.empty(2, shape.taps * CHANNELS)
        conv2d.sketch(x[:1], x[:1], u, v, block, shape)


def _index(rows: int, cols: int, slots: int) -> Index:
    """Return an index of the right shapes: only a running kernel would read what is in it."""
    lengths = (rows + 1, slots + PADDING, slots + PADDING, cols + 1, slots + PADDING, slots + PADDING)
    return Index(*(torch.zeros(length, dtype=torch.int32) for length in lengths))


class _Architecture:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, arch: str) -> None:
        self.capability = int(arch.removeprefix("sm_"))

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


@contextmanager
def _warm_ups_for(arch: str) -> Iterator[list[tuple[str, Any]]]:
    """Turn launches into compilations for an architecture; yield the list of ``(function, compiled kernel)``."""
    launched: list[tuple[str, Any]] = []
    run = JITFunction.run

    def warm_up(self: Any, *args: Any, **kwargs: Any) -> None:
        launched.append((self.__name__, run(self, *args, **kwargs | {"warmup": True})))

    driver.set_active(_Architecture(arch))
    with (
        patch.object(JITFunction, "run", warm_up),
        ExitStack() as patches,
    ):
        for module in (conv2d, linear):
            patches.enter_context(patch.object(module, "arch", lambda device: arch))
        yield launched
