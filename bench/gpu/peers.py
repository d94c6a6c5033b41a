"""Other libraries that multiply by stored blocks, each as far as it goes. What they need prepared is not timed.

    torch-bsr   PyTorch's own block-compressed rows: three Triton functions, not joined by autograd, so its step is the
                three calls after each other, and dx has a transposed copy of the weight made in advance
    stk         stanford-stk: blocks of 128, half precision
    blksprs     both operands in blocks: x, y and their gradients count as blocks already

A peer that has no way to run a case raises :class:`NotSupported`; the race records why and goes on.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from bench.gpu.contestants import SPARSE, Contestant, joined
from bench.gpu.scene import Answer, Scene

PACKAGES = {"stk": "stanford-stk", "blksprs": "blksprs"}
"""Packages that need not be installed, by peer, which is also the name of the module."""


class NotSupported(Exception):
    """A peer has no way to run this."""


def present() -> list[str]:
    """Return the names of the peers that can be imported."""
    return ["torch-bsr", *(name for name in PACKAGES if importlib.util.find_spec(name))]


def absent() -> list[str]:
    """Return the packages of the peers that are not installed."""
    return [package for name, package in PACKAGES.items() if importlib.util.find_spec(name) is None]


def peer(name: str, scene: Scene, op: str) -> Contestant:
    """Return a contestant; preparing it may raise whatever the library raises."""
    makers: dict[str, Callable[[Scene, str], Contestant]] = {"torch-bsr": torch_bsr, "stk": stk, "blksprs": blksprs}
    return makers[name](scene, op)


def pointers(major: Tensor, count: int) -> Tensor:
    """Return ``(count + 1,)``: where each row starts, of the sorted row numbers ``major``."""
    counts = torch.bincount(major.long(), minlength=count)
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def transposed_order(scene: Scene) -> Tensor:
    """Return the slots in the order of the transposed weight."""
    return (scene.col.long() * scene.grid.rows + scene.row.long()).argsort()


def torch_bsr(scene: Scene, op: str) -> Contestant:
    """Return ``torch.sparse``'s block-compressed rows. Slots of a scene are in row-major order already."""
    from torch.sparse import _triton_ops as functions

    if scene.x.device.type == "cpu" and (op != "fwd" or scene.dtype != torch.float32):
        raise NotSupported("on the CPU it has only the forward, in float32; the rest are Triton kernels")
    grid = scene.grid
    weight = torch.sparse_bsr_tensor(
        pointers(scene.row, grid.rows), scene.col.long(), scene.values, (grid.out_features, grid.in_features)
    )
    order = transposed_order(scene)
    turned = torch.sparse_bsr_tensor(
        pointers(scene.col[order], grid.cols),
        scene.row[order].long(),
        scene.values[order].transpose(1, 2).contiguous(),
        (grid.in_features, grid.out_features),
    )

    def fwd() -> Tensor:
        return dense_linear(scene.x, weight)

    def dx() -> Tensor:
        out = scene.dy.new_empty(grid.in_features, scene.dy.shape[0])
        return functions.bsr_dense_addmm(out, turned, scene.dy.t(), beta=0, alpha=1, out=out).t()

    def dvalues() -> Tensor:
        if functions.sampled_addmm is None:
            raise NotSupported("torch.sparse has no Triton functions here")
        return functions.sampled_addmm(weight, scene.dy.t(), scene.x, beta=0.0, alpha=1.0).values()

    return joined("torch-bsr", SPARSE, scene, op, fwd, dx, dvalues)


def stk(scene: Scene, op: str) -> Contestant:
    """Return stanford-stk. Its index is int16 by default; int32 is what its kernels compile with on newer Tritons."""
    import stk as library

    grid = scene.grid
    if grid.block[0] != 128 or scene.dtype not in (torch.float16, torch.bfloat16):
        raise NotSupported("it has blocks of 128 in half precision")
    size = (grid.out_features, grid.in_features)
    offsets = pointers(scene.row, grid.rows).int()
    weight = library.Matrix(size, scene.values, scene.row.int(), scene.col.int(), offsets)
    turned = weight.t()
    return joined(
        "stk",
        SPARSE,
        scene,
        op,
        lambda: library.ops.dds(scene.x, turned),
        lambda: library.ops.dds(scene.dy, weight),
        lambda: library.ops.sdd(scene.dy.t(), scene.x, weight).data,
    )


def blksprs(scene: Scene, op: str) -> Contestant:
    """Return blksprs: ``x`` times the transposed weight, all of them lists of blocks."""
    import blksprs as library

    grid, side, tokens = scene.grid, scene.grid.block[0], scene.x.shape[0]
    if tokens % side:
        raise NotSupported(f"it needs a multiple of {side} tokens")
    if op not in ("fwd", "step"):
        raise NotSupported("its gradients come from autograd only")

    def full(blocks: int) -> Tensor:
        return torch.ones(1, tokens // side, blocks, dtype=torch.bool, device=scene.x.device)

    def blocks(matrix: Tensor, layout: Tensor) -> Tensor:
        return library.ops.to_sparse(matrix[None].contiguous(), layout, side)

    layout = torch.zeros(1, grid.cols, grid.rows, dtype=torch.bool, device=scene.x.device)
    layout[0, scene.col.long(), scene.row.long()] = True
    cache: dict[str, object] = {}
    x = blocks(scene.x, full(grid.cols)).detach().requires_grad_()
    turned = blocks(scene.weight.T, layout).detach().requires_grad_()
    dy = blocks(scene.dy, full(grid.rows))

    def fwd() -> Tensor:
        return library.ops.matmul(x, full(grid.cols), turned, layout, full(grid.rows), side, layout_cache=cache)

    def step() -> tuple[Tensor, ...]:
        y = fwd()
        return y.detach(), *torch.autograd.grad(y, (x, turned), dy)

    def dense(found: Tensor, given: Tensor) -> Tensor:
        return torch.Tensor(library.ops.to_dense(found, given, side))[0]

    def answer(result: object) -> Answer:
        parts = result if isinstance(result, tuple) else (result,)
        found = {"y": dense(parts[0], full(grid.rows))}
        if op == "step":
            found["dx"] = dense(parts[1], full(grid.cols))
            found["dvalues"] = scene.blocks_of(dense(parts[2], layout).T.contiguous())
        return found

    return Contestant("blksprs", SPARSE, torch.no_grad()(fwd) if op == "fwd" else step, answer)
