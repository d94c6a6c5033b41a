"""The package and cuDNN, both channels last, on one convolution.

There is no other library with a convolution of block-sparse weights.
"""

from __future__ import annotations

import torch
from sparsekern.kernels import gpu

import sparsekern
from bench.gpu.contestants import DENSE, OURS, Contestant, named
from bench.gpu.scene import Answer
from bench.gpu.scene_conv2d import Scene
from sparsekern.ops import conv2d


def sparsekern_gpu(scene: Scene, op: str) -> Contestant:
    """Return the package's Triton kernels; a step goes through autograd."""
    values, x = scene.values.detach().requires_grad_(), scene.x.detach().requires_grad_()
    grid, shape, size = scene.grid, scene.shape, (scene.x.shape[2], scene.x.shape[3])
    kernels = gpu.kernels(shape)

    def step() -> tuple[torch.Tensor, ...]:
        with sparsekern.backend("gpu"):
            y = conv2d(x, values, None, scene.index, grid, shape)
            return y.detach(), *torch.autograd.grad(y, (x, values), scene.dy)

    runs = {
        "fwd": lambda: kernels.fwd(scene.x, scene.values, None, scene.index, shape),
        "dx": lambda: kernels.dx(scene.dy, scene.values, scene.index, shape, size),
        "dvalues": lambda: kernels.dvalues(scene.dy, scene.x, scene.index, grid.block, shape, scene.dtype),
        "block_norms": lambda: kernels.block_norms(scene.dy, scene.x, scene.row, scene.col, grid.block, shape),
        "all_block_norms": lambda: kernels.all_block_norms(scene.dy, scene.x, grid.block, shape),
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
