"""Initial values, by the number of inputs that an output really has."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from sparsekern.errors import InputError
from sparsekern.topology import Topology
from sparsekern.topology.arguments import check_number

CHUNK = 2**16
"""Slots that are looked at together: what is made of their places is many times as large as they are."""


def _chunks(topology: Topology) -> Iterator[tuple[slice, Topology]]:
    """Yield some slots after the other, and where they are."""
    for start in range(0, topology.slots, CHUNK):
        part = slice(start, start + CHUNK)
        yield part, Topology(topology.grid, topology.row[part], topology.col[part])


def fan_in(topology: Topology) -> Tensor:
    """Return ``(R,)`` int64: the stored inputs of each output of a block row."""
    grid = topology.grid
    total = torch.zeros(grid.rows, dtype=torch.int64, device=topology.row.device)
    for _, some in _chunks(topology):
        inputs = torch.where(some.used(), grid.real_cols(some.col), 0).long()
        total.index_add_(0, some.row.clamp(min=0), inputs)
    return total


def check_scale(scale: float) -> None:
    """Raise ValueError unless an ``init_scale`` is a finite number above 0; TypeError if it is no number."""
    rule = "a number above 0 that multiplies initial values: 1 for PyTorch's rule"
    check_number("init_scale", scale, rule)
    if not (math.isfinite(scale) and scale > 0):
        raise InputError(f"init_scale is {scale}; it must be {rule}", parameter="init_scale")


def draw_values(
    topology: Topology,
    dtype: torch.dtype,
    generator: torch.Generator,
    scale: float = 1.0,
    within: Topology | None = None,
) -> Tensor:
    """Draw ``values (Z, bo, bi)`` on the CPU, uniform in ``+-scale / sqrt(fan_in)`` with the *actual* fan-in.

    At a scale of 1 that is the rule of :class:`torch.nn.Linear` and :class:`torch.nn.Conv2d`, of variance
    ``1 / (3 fan_in)``; with all blocks present it is the same distribution. Free slots and phantom elements are zero.

    Args:
        topology: on the CPU.
        dtype: of the result; drawn in float32 (float64 for float64).
        generator: a CPU generator.
        scale: multiplies the bound.
        within: of the layer, where ``topology`` is some of its blocks.
    """
    drawn = torch.float64 if dtype == torch.float64 else torch.float32
    values = torch.empty(topology.slots, *topology.grid.block, dtype=drawn, device="cpu")
    values.uniform_(-1, 1, generator=generator)
    bound = fan_in(within or topology).clamp(min=1).to(drawn).rsqrt() * scale
    for part, some in _chunks(topology):
        values[part] *= bound.index_select(0, some.row.clamp(min=0)).view(-1, 1, 1)
        if (real := some.real()) is not None:
            values[part].masked_fill_(~real, 0)
    return values.to(dtype)


def draw_bias(topology: Topology, dtype: torch.dtype, generator: torch.Generator, scale: float = 1.0) -> Tensor:
    """Draw ``(out_features,)`` on the CPU, uniform in ``+-scale / sqrt(fan_in)`` of each output."""
    grid = topology.grid
    real_rows = grid.real_rows(torch.arange(grid.rows, device="cpu"))  # the last of each group may have fewer
    bound = fan_in(topology).clamp(min=1).double().rsqrt().repeat_interleave(real_rows) * scale
    drawn = torch.empty(grid.out_features, dtype=torch.float64, device="cpu")
    drawn.uniform_(-1, 1, generator=generator)
    return (drawn * bound).to(dtype)
