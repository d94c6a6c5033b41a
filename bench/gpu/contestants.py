"""The package and cuBLAS, on one case. Others' libraries are in :mod:`bench.gpu.peers`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from sparsekern.kernels import gpu
from sparsekern.kernels.contract import LinearShape
from torch.nn.functional import linear as dense_linear

import sparsekern
from bench.gpu.scene import Answer, Scene
from sparsekern.ops import linear

OURS, DENSE, SPARSE = "sparsekern", "dense", "sparse"


@dataclass(frozen=True)
class Contestant:
    """Something that can be timed on a scene."""

    name: str
    kind: str
    """``sparsekern`` | ``dense`` | ``sparse`` (another library that stores blocks)"""
    run: Callable[[], object]
    answer: Callable[[object], Answer]
    """Brings what ``run`` returned into the form of the scene; not timed."""


def sparsekern_gpu(scene: Scene, op: str) -> Contestant:
    """Return the package's Triton kernels; a step goes through autograd."""
    values, x = scene.values.detach().requires_grad_(), scene.x.detach().requires_grad_()
    grid = scene.grid
    sizes = LinearShape(grid.in_features, grid.out_features)
    kernels = gpu.kernels(sizes)

    def step() -> tuple[torch.Tensor, ...]:
        with sparsekern.backend("gpu"):
            y = linear(x, values, None, scene.index, grid)
            return y.detach(), *torch.autograd.grad(y, (x, values), scene.dy)

    runs = {
        "fwd": lambda: kernels.fwd(scene.x, scene.values, None, scene.index, sizes),
        "dx": lambda: kernels.dx(scene.dy, scene.values, scene.index, sizes, ()),
        "dvalues": lambda: kernels.dvalues(scene.dy, scene.x, scene.index, grid.block, sizes, scene.dtype),
        "block_norms": lambda: kernels.block_norms(scene.dy, scene.x, scene.row, scene.col, grid.block, sizes),
        "all_block_norms": lambda: kernels.all_block_norms(scene.dy, scene.x, grid.block, sizes),
        "step": step,
    }
    return Contestant("sparsekern", OURS, runs[op], lambda result: named(op, result))


def cublas(scene: Scene, op: str) -> Contestant:
    """Return the dense layer with the zeros in it: cuBLAS on a GPU. Its gradient of the weight is dense."""
    weight, x = scene.weight.detach().requires_grad_(), scene.x.detach().requires_grad_()

    def step() -> tuple[torch.Tensor, ...]:
        y = dense_linear(x, weight)
        return y.detach(), *torch.autograd.grad(y, (x, weight), scene.dy)

    def answer(result: object) -> Answer:
        found = named(op, result)
        return {name: scene.blocks_of(t) if name == "dvalues" else t for name, t in found.items()}

    runs = {
        "fwd": lambda: dense_linear(scene.x, scene.weight),
        "dx": lambda: scene.dy @ scene.weight,
        "dvalues": lambda: scene.dy.T @ scene.x,
        "step": step,
    }
    return Contestant("cublas", DENSE, runs[op], answer)


def named(op: str, result: object) -> Answer:
    """Return what a run gave by the names of the answers."""
    if op == "step":
        assert isinstance(result, tuple)
        return dict(zip(("y", "dx", "dvalues"), result, strict=True))
    assert isinstance(result, torch.Tensor)
    return {"y" if op == "fwd" else op: result}


def joined(
    name: str,
    kind: str,
    scene: Scene,
    op: str,
    fwd: Callable[[], torch.Tensor],
    dx: Callable[[], torch.Tensor],
    dvalues: Callable[[], torch.Tensor],
    backward: Callable[[], tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> Contestant:
    """Return a contestant without autograd, whose step is the forward and ``backward``, else the other two in turn."""
    gradients = backward or (lambda: (dx(), dvalues()))
    runs: dict[str, Callable[[], object]] = {
        "fwd": fwd,
        "dx": dx,
        "dvalues": dvalues,
        "step": lambda: (fwd(), *gradients()),
    }
    return Contestant(name, kind, torch.no_grad()(runs[op]), functools.partial(named, op))
