"""The comparison of the convolution: the package and cuDNN, both channels last, take turns in one process.

There is no other library with a convolution of block-sparse weights. What is tuned are the linear layers; these calls
get the first guess of the roofline.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from sparsekern.kernels import gpu

import sparsekern
from bench.gpu.clock import Clock
from bench.gpu.contestants import DENSE, OURS, Contestant, named
from bench.gpu.part import Part, check_device, main, say_what_failed
from bench.gpu.race import run_case
from bench.gpu.scene import Answer
from bench.gpu.scene_conv2d import Case, Scene, make_scene
from sparsekern.ops import conv2d

SHAPES = ((128, 16, 256, 1), (128, 8, 512, 1), (128, 32, 128, 1), (128, 16, 256, 2), (32, 8, 256, 1))
"""Images, rows and columns, channels, stride: the layers of a ResNet on small images."""


def cases() -> list[Case]:
    """Return all cases, most valuable first."""
    head = SHAPES[:2]
    ordered = (
        *_series("step", head, (64,), (0.9, 0.95)),
        *_series("step", SHAPES[2:], (64,), (0.9,)),
        *(c for op in ("fwd", "dx", "dvalues") for c in _series(op, head, (64,), (0.9,))),
        *_series("step", head, (32, 128), (0.9,)),
        *_series("step", head, (64,), (0.5, 0.75)),
        *_series("step", head, (64,), (0.9,), dtype="fp32"),
    )
    return list(dict.fromkeys(ordered))


def _series(
    op: str,
    shapes: tuple[tuple[int, int, int, int], ...],
    blocks: tuple[int, ...],
    sparsities: tuple[float, ...],
    dtype: str = "bf16",
) -> Iterator[Case]:
    for sparsity in sparsities:
        for block in blocks:
            for images, size, channels, stride in shapes:
                yield Case(op, dtype, images, size, channels, channels, stride, block, sparsity)


def rehearsal_cases() -> list[Case]:
    """Return a few tiny cases in which everything occurs."""
    tiny = [Case(op, "fp32", 1, 4, 32, 32, 1, 16, 0.5) for op in ("fwd", "dx", "dvalues", "step")]
    return [*tiny, Case("step", "fp16", 2, 5, 32, 64, 2, 32, 0.5)]


def sparsekern_gpu(scene: Scene, op: str) -> Contestant:
    """Return the package's Triton kernels; a step goes through autograd."""
    values, x = scene.values.detach().requires_grad_(), scene.x.detach().requires_grad_()
    grid, shape, size = scene.grid, scene.shape, (scene.x.shape[2], scene.x.shape[3])

    def step() -> tuple[torch.Tensor, ...]:
        with sparsekern.backend("gpu"):
            y = conv2d(x, values, None, scene.index, grid, shape)
            return y.detach(), *torch.autograd.grad(y, (x, values), scene.dy)

    runs = {
        "fwd": lambda: gpu.conv2d_fwd(scene.x, scene.values, None, scene.index, shape),
        "dx": lambda: gpu.conv2d_dx(scene.dy, scene.values, scene.index, shape, size),
        "dvalues": lambda: gpu.conv2d_dvalues(scene.dy, scene.x, scene.index, grid.block, shape, scene.dtype),
        "step": step,
    }
    return Contestant("sparsekern", OURS, runs[op], lambda result: named(op, result))


def cudnn(scene: Scene, op: str) -> Contestant:
    """Return the dense convolution with the zeros in it, channels last: cuDNN on a GPU."""
    weight = scene.weight.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    x, shape = scene.x.detach().requires_grad_(), scene.shape

    def backward(wanted: list[bool]) -> tuple[torch.Tensor, ...]:
        gradients = torch.ops.aten.convolution_backward(
            scene.dy, scene.x, weight.detach(), None, shape.stride, shape.padding[::2], shape.dilation, False, [0, 0],
            shape.groups, wanted,
        )  # fmt: skip
        return tuple(gradients)

    def step() -> tuple[torch.Tensor, ...]:
        y = scene.dense(x, weight)
        return y.detach(), *torch.autograd.grad(y, (x, weight), scene.dy)

    def answer(result: object) -> Answer:
        found = named(op, result)
        return {name: scene.blocks_of(t) if name == "dvalues" else t for name, t in found.items()}

    runs = {
        "fwd": lambda: scene.dense(scene.x, weight.detach()),
        "dx": lambda: backward([True, False, False])[0],
        "dvalues": lambda: backward([False, True, False])[1],
        "step": step,
    }
    return Contestant("cudnn", DENSE, runs[op], answer)


def run(part: Part) -> bool:
    """Run the cases that are not in the results yet; return whether all are."""
    clock = Clock(part.device)
    torch.set_float32_matmul_precision("high")  # float32 is tf32 for everyone
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    for case in rehearsal_cases() if part.rehearsal else cases():
        if part.results.has(case.key):
            continue
        if part.over(0.0 if part.rehearsal else 5.0):
            print(f"conv2d: the budget is over before {case.key}")
            return False
        part.results.begin(case.key)
        try:
            run_case(part, clock, case, {"sparsekern": sparsekern_gpu, "cudnn": cudnn}, make_scene)
        except Exception as error:  # such as a GPU too small for the case
            print(f"conv2d: {case.key}: {say_what_failed(error)}")
            part.results.add({"key": case.key, "error": say_what_failed(error)})
            check_device(part.device)
    return True


if __name__ == "__main__":
    sys.exit(main("conv2d", __doc__, run))
