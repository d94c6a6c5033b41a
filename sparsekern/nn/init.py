"""Initial places and values of a layer: the values follow from the number of inputs that each output really has."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from sparsekern.topology import Grid, Topology, allocate, balanced, one_tap, random, tie
from sparsekern.topology.arguments import check_choice, check_number

INITS = {"balanced": balanced, "random": random}
"""Functions that draw an initial topology, by the name that ``init`` takes."""

CHUNK = 2**16
"""Slots handled at a time: intermediate tensors are several times as large as the places."""


def _chunks(topology: Topology) -> Iterator[tuple[slice, Topology]]:
    """Yield the slots in chunks: the slice, and the topology of these slots."""
    for start in range(0, topology.slots, CHUNK):
        part = slice(start, start + CHUNK)
        yield part, Topology(topology.grid, topology.row[part], topology.col[part])


def fan_in(topology: Topology) -> Tensor:
    """Return ``(R,)`` int64: how many stored inputs each output of a block row has."""
    grid = topology.grid
    total = torch.zeros(grid.rows, dtype=torch.int64, device=topology.row.device)
    for _, some in _chunks(topology):
        inputs = torch.where(some.used(), grid.real_cols(some.col), 0).long()
        total.index_add_(0, some.row.clamp(min=0), inputs)
    return total


def check_init(init: object, scale: object, known: Collection[str] = tuple(INITS)) -> None:
    """Check ``init``, one of the known names, and ``init_scale``, a finite number above 0.

    Raises:
        ValueError: one of them is something else.
        TypeError: the scale is not a number.
    """
    check_choice("init", init, known)
    rule = "a number above 0 that multiplies the initial values: 1 for PyTorch's rule"
    check_number("init_scale", scale, rule, lambda factor: 0 < factor < math.inf)


def blocks_of(grid: Grid, sparsity: float, tie_taps: bool = False) -> int:
    """Return the number of blocks at a sparsity; with tied taps, the same number in each tap."""
    if not tie_taps:
        return allocate([grid], sparsity)[0]
    return allocate([one_tap(grid)], sparsity)[0] * grid.taps


def draw_topology(grid: Grid, init: str, blocks: int, tie_taps: bool, generator: torch.Generator) -> Topology:
    """Draw the initial topology of a layer on the CPU.

    Args:
        grid: the grid of the layer.
        init: one of :data:`INITS`.
        blocks: number of blocks; with tied taps a multiple of the taps.
        tie_taps: whether all taps store the same blocks of channels.
        generator: a CPU generator.
    """
    if tie_taps:
        return tie(INITS[init](one_tap(grid), blocks // grid.taps, generator), grid)
    return INITS[init](grid, blocks, generator)


def draw_values(
    topology: Topology, inputs: Tensor, dtype: torch.dtype, generator: torch.Generator, scale: float = 1.0
) -> Tensor:
    """Draw ``values (Z, bo, bi)`` on the CPU, uniform in ``+-scale / sqrt(fan_in)``.

    The fan-in is the number of *stored* inputs of an output. At a scale of 1 this is the rule of
    :class:`torch.nn.Linear` and :class:`torch.nn.Conv2d`, with variance ``1 / (3 fan_in)``; with all blocks stored the
    distribution is the same. Free slots and phantom elements are zero.

    Args:
        topology: the places, on the CPU; of all blocks of a layer, or of some.
        inputs: the layer's :func:`fan_in` ``(R,)``.
        dtype: dtype of the result; float64 is drawn in float64, all others in float32.
        generator: a CPU generator.
        scale: multiplies the bound.
    """
    drawn = torch.float64 if dtype == torch.float64 else torch.float32
    values = torch.empty(topology.slots, *topology.grid.block, dtype=drawn, device="cpu")
    values.uniform_(-1, 1, generator=generator)
    bound = inputs.clamp(min=1).to(drawn).rsqrt() * scale
    for part, some in _chunks(topology):
        values[part] *= bound.index_select(0, some.row.clamp(min=0)).view(-1, 1, 1)
        if (real := some.real()) is not None:
            values[part].masked_fill_(~real, 0)
    return values.to(dtype)


def draw_bias(grid: Grid, inputs: Tensor, dtype: torch.dtype, generator: torch.Generator, scale: float = 1.0) -> Tensor:
    """Draw the bias ``(out_features,)`` on the CPU, uniform in ``+-scale / sqrt(fan_in)`` of each output.

    Args:
        grid: the grid of the layer.
        inputs, dtype, generator, scale: as in :func:`draw_values`.
    """
    real_rows = grid.real_rows(torch.arange(grid.rows, device="cpu"))  # the last block row of each group may have fewer
    bound = inputs.clamp(min=1).double().rsqrt().repeat_interleave(real_rows) * scale
    drawn = torch.empty(grid.out_features, dtype=torch.float64, device="cpu")
    drawn.uniform_(-1, 1, generator=generator)
    return (drawn * bound).to(dtype)
