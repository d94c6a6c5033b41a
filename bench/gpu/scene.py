"""The numbers of one case, what the answer must be, and how far from it is still right.

The reference is a masked dense layer in float64, built from row and col alone: nothing of the package's own conversions
is in it. Two bounds:

    element by element, for the package:  |err| <= (k + 2) * 2 * eps_acc * magnitude + eps_out * |exact|
    as a whole, for everyone:             ||err|| <= eps_out * ||exact||      (float32: see Judge)

``k`` is how many products a sum has, ``magnitude`` the same sum over absolute values. tf32 drops 13 bits of each
factor, so a product is off by 2 ** -9 of itself; that term comes on top. Others are free to round partial sums to the
output dtype (cuBLAS does), hence the second bound for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from sparsekern.topology import Grid, Index, Topology, balanced, blocks_at, build_index, random

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""fp32 is float32 multiplied as tf32, by everyone."""

DRAWS = {"random": random, "balanced": balanced}
OPS = ("fwd", "dx", "dvalues", "step")
NORMS = ("block_norms", "all_block_norms")
"""What a training method asks for; tuned, but not raced."""

ANSWERS = {op: (op,) for op in ("dx", "dvalues", *NORMS)} | {"fwd": ("y",), "step": ("y", "dx", "dvalues")}

Answer = dict[str, Tensor]


class Case(NamedTuple):
    """What is measured. ``K`` inputs, ``N`` outputs."""

    op: str
    dtype: str
    tokens: int
    in_features: int
    out_features: int
    block: int
    sparsity: float
    draw: str = "random"

    @property
    def key(self) -> str:
        """The name in the results."""
        shape = f"T{self.tokens} K{self.in_features} N{self.out_features}"
        return f"{self.op} {self.dtype} {shape} b{self.block} s{self.sparsity:g} {self.draw}"


@dataclass(frozen=True)
class Scene:
    """Tensors of a case, and the exact answers. ``(T, K)``, ``(T, N)``, ``(Z, b, b)``, ``(N, K)``."""

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

    @cached_property
    def elements(self) -> int:
        """Stored numbers."""
        return self.values.numel()

    def blocks_of(self, matrix: Tensor) -> Tensor:
        """Return ``(Z, b, b)``: what an ``(N, K)`` matrix holds where blocks are stored."""
        bo, bi = self.grid.block
        return matrix.view(self.grid.rows, bo, self.grid.cols, bi)[self.row.long(), :, self.col.long(), :]

    def exact(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return an answer in float64, its magnitude, and how many products its sums have (broadcastable)."""
        x, dy, weight = self.x.double(), self.dy.double(), self.weight.double()
        stored = torch.zeros_like(self.weight, dtype=torch.float32)
        bo, bi = self.grid.block
        stored.view(self.grid.rows, bo, self.grid.cols, bi)[self.row.long(), :, self.col.long(), :] = 1
        if name == "y":
            return x @ weight.T, x.abs() @ weight.abs().T, stored.sum(1).double()
        if name == "dx":
            return dy @ weight, dy.abs() @ weight.abs(), stored.sum(0).double()
        tokens = torch.tensor(float(x.shape[0]), dtype=torch.float64, device=x.device)
        gradient, magnitude = dy.T @ x, dy.abs().T @ x.abs()
        if name == "all_block_norms":
            full = (self.grid.rows, bo, self.grid.cols, bi)
            return gradient.view(full).norm(dim=(1, 3)), magnitude.view(full).norm(dim=(1, 3)), tokens
        blocks, of_blocks = self.blocks_of(gradient), self.blocks_of(magnitude)
        if name == "block_norms":
            return blocks.norm(dim=(1, 2)), of_blocks.norm(dim=(1, 2)), tokens
        return blocks, of_blocks, tokens


def make_scene(case: Case, device: torch.device, seed: int = 0) -> Scene:
    """Draw the numbers of a case from a seed; the block size divides the shape."""
    grid = Grid(case.out_features, case.in_features, (case.block, case.block))
    if grid.has_edge:
        raise ValueError(f"blocks of {case.block} do not divide {case.out_features} x {case.in_features}")
    count = max(1, blocks_at(case.sparsity, grid.cells))
    drawn = DRAWS[case.draw](grid, count, torch.Generator().manual_seed(seed))
    topology = Topology(grid, drawn.row.to(device), drawn.col.to(device))
    generator = torch.Generator(device).manual_seed(seed)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(DTYPES[case.dtype])

    values = numbers(count, case.block, case.block)
    weight = torch.zeros(case.out_features, case.in_features, dtype=values.dtype, device=device)
    cells = weight.view(grid.rows, case.block, grid.cols, case.block)
    cells[topology.row.long(), :, topology.col.long(), :] = values
    return Scene(
        grid=grid,
        row=topology.row,
        col=topology.col,
        index=build_index(topology),
        x=numbers(case.tokens, case.in_features),
        dy=numbers(case.tokens, case.out_features),
        values=values,
        weight=weight,
    )


class Judge:
    """Holds the exact answers of one case and says what is wrong with another one.

    Args:
        scene: the numbers.
        op: which answers.
        tf32: whether float32 is multiplied as tf32. If not, an answer in it as a whole may be off by what rounding
            after each of ``k`` additions gives, ``sqrt(k) * eps``.
    """

    def __init__(self, scene: Scene, op: str, *, tf32: bool = True) -> None:
        self.scene, self.exact = scene, {name: scene.exact(name) for name in ANSWERS[op]}
        self.tf32 = tf32 and scene.dtype == torch.float32

    def wrong(self, answer: Answer, by_element: bool) -> str | None:
        """Return what is wrong with an answer as half a sentence, or None."""
        for name, given in answer.items():
            exact, magnitude, terms = self.exact[name]
            dtype = torch.float32 if name in NORMS else self.scene.dtype
            if given.shape != exact.shape or given.dtype != dtype:
                return f"{name} is {given.dtype} of shape {tuple(given.shape)}, not {tuple(exact.shape)}"
            error = (given.double() - exact).abs()
            eps_out = torch.finfo(self.scene.dtype).eps
            eps_sum = torch.finfo(torch.float32).eps
            share = float(error.norm() / exact.norm())
            allowed = 2**-9 if self.tf32 else max(eps_out, eps_sum * float(terms.max()) ** 0.5)
            if not share <= allowed:  # NaN is not
                return f"{name} is off by {share:.2g} of its norm"
            if by_element:
                eps_product = (terms + 2) * 2 * eps_sum + (2**-9 if self.tf32 else 0.0)
                good = error <= eps_product * magnitude + eps_out * exact.abs()
                if not bool(good.all()):
                    at = tuple((~good).nonzero()[0].tolist())
                    count = f"{int((~good).sum())} of {good.numel()} elements are wrong"
                    return f"{name}{list(at)} is {float(given[at]):.6g}, not {float(exact[at]):.6g}; {count}"
        return None
