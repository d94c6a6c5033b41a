"""The numbers of a convolution, and what the answer must be: :mod:`bench.gpu.scene` for images, channels last.

The reference is torch's own convolution in float64 with the zeros in its weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from sparsekern.kernels.contract import ConvShape
from torch import Tensor
from torch.nn.functional import conv2d

from bench.gpu.scene import DTYPES, NORMS
from sparsekern.topology import Grid, Index, Topology, blocks_at, build_index, conv_grid, random


class Case(NamedTuple):
    """What is measured: a 3x3 convolution, padded by 1."""

    op: str
    dtype: str
    images: int
    size: int
    """Rows and columns of x."""
    in_channels: int
    out_channels: int
    stride: int
    block: int
    sparsity: float

    @property
    def key(self) -> str:
        """The name in the results."""
        channels = f"{self.in_channels}-{self.out_channels}"
        shape = f"{self.images}x{self.size}x{self.size} {channels} stride {self.stride}"
        return f"conv2d {self.op} {self.dtype} {shape} b{self.block} s{self.sparsity:g}"

    @property
    def shape(self) -> ConvShape:
        """The convolution."""
        return ConvShape(self.in_channels, self.out_channels, (3, 3), (self.stride,) * 2, (1, 1, 1, 1))

    @property
    def tokens(self) -> int:
        """Pixels of y."""
        rows, cols = self.shape.output_size(self.size, self.size)
        return self.images * rows * cols


@dataclass(frozen=True)
class Scene:
    """Tensors of a case, and the exact answers. ``values (Z, b, b)``, ``weight (Cout, Cin, 3, 3)``."""

    shape: ConvShape
    grid: Grid
    row: Tensor
    col: Tensor
    index: Index
    x: Tensor
    dy: Tensor
    values: Tensor
    weight: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self.x.dtype

    @property
    def elements(self) -> int:
        """Stored numbers."""
        return self.values.numel()

    def blocks_of(self, weight: Tensor) -> Tensor:
        """Return ``(Z, b, b)``: what a dense weight holds where blocks are stored."""
        return _cells(weight.permute(0, 2, 3, 1), self.grid)[self.row.long(), :, self.col.long(), :]

    def dense(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return torch's convolution."""
        return conv2d(x, weight, None, self.shape.stride, self.shape.padding[::2])

    def exact(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return an answer in float64, its magnitude, and the most products that a sum of it has."""
        x, dy, weight = (t.double() for t in (self.x, self.dy, self.weight))
        exact, magnitude = (self._answer(name, *t) for t in ((x, dy, weight), (x.abs(), dy.abs(), weight.abs())))
        of_weight = name == "dvalues" or name in NORMS
        most = dy.numel() // dy.shape[1] if of_weight else self.grid.out_features + self.grid.in_features
        return exact, magnitude, torch.tensor(float(most), dtype=torch.float64, device=x.device)

    def _answer(self, name: str, x: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
        if name == "y":
            return self.dense(x, weight)
        x, weight = x.requires_grad_(name == "dx"), weight.requires_grad_(name != "dx")
        (gradient,) = torch.autograd.grad(self.dense(x, weight), x if name == "dx" else weight, dy)
        if name == "dx":
            return gradient
        if name == "all_block_norms":
            return _cells(gradient.permute(0, 2, 3, 1), self.grid).norm(dim=(1, 3))
        blocks = self.blocks_of(gradient)
        return blocks.norm(dim=(1, 2)) if name == "block_norms" else blocks


def _cells(matrix: Tensor, grid: Grid) -> Tensor:
    bo, bi = grid.block
    return matrix.reshape(grid.rows, bo, grid.cols, bi)


def make_scene(case: Case, device: torch.device, seed: int = 0) -> Scene:
    """Draw the numbers of a case from a seed; the block size divides the channels."""
    shape, block = case.shape, (case.block, case.block)
    grid = conv_grid(case.in_channels, case.out_channels, shape.kernel, block)
    if grid.has_edge:
        raise ValueError(f"blocks of {case.block} do not divide {case.in_channels} and {case.out_channels} channels")
    count = max(1, blocks_at(case.sparsity, grid.cells))
    drawn = random(grid, count, torch.Generator().manual_seed(seed))
    topology = Topology(grid, drawn.row.to(device), drawn.col.to(device))
    generator = torch.Generator(device).manual_seed(seed)

    def numbers(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).to(DTYPES[case.dtype])

    values = numbers(count, *block)
    weight = torch.zeros(case.out_channels, *shape.kernel, case.in_channels, dtype=values.dtype, device=device)
    _cells(weight, grid)[topology.row.long(), :, topology.col.long(), :] = values
    return Scene(
        shape=shape,
        grid=grid,
        row=topology.row,
        col=topology.col,
        index=build_index(topology),
        x=numbers(case.images, case.size, case.size, case.in_channels).permute(0, 3, 1, 2),
        dy=numbers(case.images, *shape.output_size(case.size, case.size), case.out_channels).permute(0, 3, 1, 2),
        values=values,
        weight=weight.permute(0, 3, 1, 2),
    )
