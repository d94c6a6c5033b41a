"""Who takes part in the race of the convolutions.

sparsekern      the kernels alone; of a pointwise convolution the linear ones, on a view
SparseConv2d    the same through autograd
channels_last   PyTorch's dense convolution and its backward (oneDNN), everything channels last
contiguous      the same on x, dy and a weight that are not
unfold          the pixels of every window copied into a row of a matrix, times our linear layer; dx summed tap by tap
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from sparsekern.kernels import cpu
from sparsekern.kernels.contract import LinearShape
from torch import Tensor
from torch.nn.functional import pad

from bench.cpu.conv_cases import ConvCase
from bench.cpu.conv_scene import ConvScene
from bench.gpu.contestants import DENSE, OURS, SPARSE, Contestant, joined, named
from bench.gpu.peers import NotSupported
from bench.gpu.scene import Answer

ConvMaker = Callable[[ConvScene, str], Contestant]


def sparsekern(scene: ConvScene, op: str) -> Contestant:
    """Return the native kernels."""
    x, dy, values, index, grid = scene.x, scene.dy, scene.values, scene.index, scene.grid
    shape, size = scene.layer.conv_shape, (scene.x.shape[2], scene.x.shape[3])
    if shape.is_pointwise:
        _refuse("linear", scene)
        return _on_rows("sparsekern", OURS, scene, op, lambda: _rows(x), lambda rows: _images(rows, x))
    _refuse("conv2d", scene)
    return joined(
        "sparsekern",
        OURS,
        scene,
        op,
        fwd=lambda: cpu.products.fwd(x, values, None, index, shape),
        dx=lambda: cpu.products.dx(dy, values, index, shape, size),
        dvalues=lambda: cpu.products.dvalues(dy, x, index, grid.block, shape, x.dtype),
        backward=lambda: cpu.products.backward(dy, x, values, index, shape),
    )


def sparse_conv2d(scene: ConvScene, op: str) -> Contestant:
    """Return the layer: forward through its module, gradients through autograd."""
    layer, x = scene.layer, scene.x.detach().requires_grad_()

    def step() -> tuple[Tensor, ...]:
        y = layer(x)
        return y.detach(), *torch.autograd.grad(y, (x, layer.values), scene.dy)

    runs: dict[str, Callable[[], object]] = {"fwd": torch.no_grad()(lambda: layer(x)), "step": step}
    return Contestant("SparseConv2d", OURS, runs[op], lambda result: named(op, result))


def dense(name: str, memory_format: torch.memory_format, scene: ConvScene, op: str) -> Contestant:
    """Return PyTorch's dense convolution, with all tensors in a memory format."""
    x, dy, weight = (t.contiguous(memory_format=memory_format) for t in (scene.x, scene.dy, scene.weight))

    def both() -> tuple[Tensor, Tensor]:
        dx, dweight = scene.dense_gradients(dy, x, weight, (True, True))
        return dx, dweight

    contestant = joined(
        name,
        DENSE,
        scene,
        op,
        fwd=lambda: scene.dense_forward(x, weight),
        dx=lambda: both()[0],
        dvalues=lambda: both()[1],
        backward=both,
    )

    def answer(result: object) -> Answer:
        found = contestant.answer(result)
        return {what: scene.blocks_of(t) if what == "dvalues" else t for what, t in found.items()}

    return dataclasses.replace(contestant, answer=answer)


def unfold(scene: ConvScene, op: str) -> Contestant:
    """Return our linear layer on the rows that the windows of x are copied into."""
    _refuse("linear", scene)
    shape = scene.layer.conv_shape
    (kh, kw), (sh, sw), around = shape.kernel, shape.stride, shape.padding[0]
    images, channels, height, width = scene.x.shape
    high, wide = scene.dy.shape[2:]

    def windows() -> Tensor:
        padded = pad(scene.x.permute(0, 2, 3, 1), (0, 0, around, around, around, around))
        return padded.unfold(1, kh, sh).unfold(2, kw, sw).permute(0, 1, 2, 4, 5, 3).reshape(-1, kh * kw * channels)

    def fold(rows: Tensor) -> Tensor:
        padded = rows.new_zeros(images, height + 2 * around, width + 2 * around, channels)
        taps = rows.view(images, high, wide, kh, kw, channels)
        for i in range(kh):
            for j in range(kw):
                padded[:, i : i + sh * (high - 1) + 1 : sh, j : j + sw * (wide - 1) + 1 : sw] += taps[:, :, :, i, j]
        return padded[:, around : around + height, around : around + width].permute(0, 3, 1, 2)

    return _on_rows("unfold", SPARSE, scene, op, windows, fold)


def _on_rows(
    name: str,
    kind: str,
    scene: ConvScene,
    op: str,
    windows: Callable[[], Tensor],
    fold: Callable[[Tensor], Tensor],
) -> Contestant:
    """Return the linear kernels on rows: what ``windows`` makes of x; ``fold`` makes dx of the rows' gradient."""
    values, index, dy = scene.values, scene.index, _rows(scene.dy)
    sizes = LinearShape(scene.grid.in_features, scene.grid.out_features)

    def forward(rows: Tensor) -> Tensor:
        return _images(cpu.products.fwd(rows, values, None, index, sizes), scene.dy)

    def step() -> tuple[Tensor, ...]:
        rows = windows()
        drows, dvalues = cpu.products.backward(dy, rows, values, index, sizes)
        return forward(rows), fold(drows), dvalues

    runs: dict[str, Callable[[], object]] = {"fwd": lambda: forward(windows()), "step": step}
    return Contestant(name, kind, torch.no_grad()(runs[op]), lambda result: named(op, result))


def _rows(images: Tensor) -> Tensor:
    """Return the pixels of channels-last images ``(N, C, H, W)`` as ``(N * H * W, C)``, a view."""
    return images.permute(0, 2, 3, 1).flatten(0, 2)


def _images(rows: Tensor, like: Tensor) -> Tensor:
    """Return rows as images of the size of others."""
    return rows.view(like.shape[0], *like.shape[2:], -1).permute(0, 3, 1, 2)


def _refuse(op: str, scene: ConvScene) -> None:
    """Raise NotSupported if the native kernels cannot run an op on this scene."""
    if (reason := cpu.why_not(op, scene.x.device, scene.dtype, scene.grid.block)) is not None:
        raise NotSupported(reason)


def makers(case: ConvCase) -> dict[str, ConvMaker]:
    """Return who takes part in a case."""
    found: dict[str, ConvMaker] = {
        "sparsekern": sparsekern,
        "SparseConv2d": sparse_conv2d,
        "channels_last": lambda scene, op: dense("channels_last", torch.channels_last, scene, op),
        "contiguous": lambda scene, op: dense("contiguous", torch.contiguous_format, scene, op),
    }
    return found if case.kernel == 1 else found | {"unfold": unfold}
