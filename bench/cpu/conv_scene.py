"""The tensors of a convolution's case, in the middle of a training as those of :mod:`bench.cpu.scene`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from bench.cpu.conv_cases import ConvCase
from bench.cpu.scene import move_at_random
from bench.gpu import scene
from bench.gpu.scene import DTYPES
from sparsekern import SparseConv2d


@dataclass(frozen=True)
class ConvScene(scene.Scene):
    """Tensors of a case, and the exact answers.

    ``x (N, Cin, H, W)``, ``dy (N, Cout, Ho, Wo)`` and ``weight (Cout, Cin, kh, kw)`` have their channels last.
    """

    layer: SparseConv2d

    def blocks_of(self, matrix: Tensor) -> Tensor:
        """Return ``(Z, b, b)``: what a dense weight holds where blocks are stored."""
        return super().blocks_of(matrix.permute(0, 2, 3, 1).reshape(matrix.shape[0], -1))

    def dense_gradients(self, dy: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool]) -> tuple[Tensor, ...]:
        """Return PyTorch's dx and dense gradient of the weight; None for what is not wanted."""
        shape = self.layer.conv_shape
        return torch.ops.aten.convolution_backward(  # type: ignore[no-any-return]
            dy, x, weight, None, shape.stride, shape.padding[::2], shape.dilation, False, (0, 0), 1, (*wanted, False)
        )[:2]

    def dense_forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return PyTorch's y."""
        shape = self.layer.conv_shape
        return conv2d(x, weight, None, shape.stride, shape.padding[::2])

    def exact(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return an answer in float64, its magnitude, and how many products its sums have at most (broadcastable)."""
        x, dy, weight = self.x.double(), self.dy.double(), self.weight.double()
        (bo, bi), (kh, kw) = self.grid.block, self.layer.kernel_size
        matrix = torch.zeros(self.grid.rows, bo, self.grid.cols, bi, dtype=torch.float64)
        matrix[self.row.long(), :, self.col.long(), :] = 1
        stored = matrix.view(weight.shape[0], kh, kw, -1).permute(0, 3, 1, 2)
        if name == "y":
            terms = stored.sum((1, 2, 3)).view(1, -1, 1, 1)
            return self.dense_forward(x, weight), self.dense_forward(x.abs(), weight.abs()), terms
        wanted = (name == "dx", name != "dx")
        place = 0 if name == "dx" else 1
        gradient = self.dense_gradients(dy, x, weight, wanted)[place]
        magnitude = self.dense_gradients(dy.abs(), x.abs(), weight.abs(), wanted)[place]
        if name == "dx":
            return gradient, magnitude, stored.sum((0, 2, 3)).view(1, -1, 1, 1)
        tokens = torch.tensor(float(dy.shape[0] * dy.shape[2] * dy.shape[3]), dtype=torch.float64)
        return self.blocks_of(gradient), self.blocks_of(magnitude), tokens


def make_conv_scene(case: ConvCase, seed: int = 0) -> ConvScene:
    """Draw the layer and the numbers of a case from a seed. The block size divides the channels."""
    shape = case.conv_shape
    layer = SparseConv2d(
        case.in_channels,
        case.out_channels,
        case.kernel,
        case.stride,
        case.kernel // 2,
        bias=False,
        dtype=DTYPES[case.dtype],
        sparsity=case.sparsity,
        block_size=case.block,
        init="random",
        seed=seed,
    )
    generator = torch.Generator().manual_seed(seed)
    move_at_random(layer, generator)

    def images(channels: int, height: int, width: int) -> Tensor:
        numbers = torch.randn(case.images, height, width, channels, generator=generator)
        return numbers.to(DTYPES[case.dtype]).permute(0, 3, 1, 2)

    with torch.no_grad():
        layer.values.copy_(torch.randn(layer.values.shape, generator=generator))
    return ConvScene(
        grid=layer.grid,
        row=layer.row,
        col=layer.col,
        index=layer.index,
        x=images(case.in_channels, case.side, case.side),
        dy=images(case.out_channels, *shape.output_size(case.side, case.side)),
        values=layer.values.detach(),
        weight=layer.dense_weight().detach().contiguous(memory_format=torch.channels_last),
        layer=layer,
    )
