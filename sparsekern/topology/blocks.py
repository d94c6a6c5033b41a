"""Values of blocks: from and to a dense weight, and in blocks of another size. Training uses none of this."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from sparsekern.errors import InputError
from sparsekern.kernels.contract import accumulate_dtype
from sparsekern.topology.grid import Grid
from sparsekern.topology.topology import Topology, from_keys

CHUNK = 2**20
"""Elements that :func:`reblock` maps at a time, each with about 40 bytes of scratch memory."""


@torch.no_grad()
def to_dense(topology: Topology, values: Tensor) -> Tensor:
    """Return the dense weight in the shape of PyTorch's layer: the blocks at their places, zero elsewhere.

    Args:
        topology: the places.
        values: ``(Z, bo, bi)``.
    """
    grid, (bo, bi) = topology.grid, topology.grid.block
    used = topology.used()
    row, col = topology.row[used].long(), topology.col[used].long()
    stored = movable(values)
    dense = stored.new_zeros(grid.rows, bo, grid.cols, bi)
    dense[row, :, col, :] = stored[used]
    return moved(_as_weight(grid, dense).contiguous(), values.dtype)


@torch.no_grad()
def gather_blocks(topology: Topology, weight: Tensor) -> Tensor:
    """Return ``values (Z, bo, bi)``: the blocks of a dense weight at the places of a topology.

    Free slots and phantom elements are zero.

    Args:
        topology: the places.
        weight: the dense weight, ``(out, in)`` or ``(Cout, Cin / groups, kh, kw)``.

    Raises:
        ValueError: the weight has another shape than the grid.
    """
    blocks = _as_blocks(topology.grid, movable(weight))
    values = blocks[topology.row.clamp(min=0).long(), :, topology.col.clamp(min=0).long(), :]
    return moved(values.masked_fill_(~topology.used().view(-1, 1, 1), 0), weight.dtype)


def movable(values: Tensor) -> Tensor:
    """Return eight-bit floating point values as bytes, which PyTorch can copy and zero; others unchanged."""
    return values.view(torch.uint8) if values.is_floating_point() and values.dtype.itemsize == 1 else values


def moved(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Undo :func:`movable`: return the values in their own dtype."""
    return values if values.dtype == dtype else values.view(dtype)


@torch.no_grad()
def dense_block_norms(grid: Grid, weight: Tensor) -> Tensor:
    """Return the Frobenius norm of every block of a dense weight, ``(R, C)``; float32 (float64 for float64)."""
    if weight.dtype.itemsize == 1:
        weight = weight.float()  # PyTorch has no arithmetic for eight-bit floating point
    norms: Tensor = torch.linalg.vector_norm(_as_blocks(grid, weight), dim=(1, 3), dtype=accumulate_dtype(weight.dtype))
    return norms


@torch.no_grad()
def dense_block_sums(grid: Grid, weight: Tensor) -> Tensor:
    """Return the sum of every block of a tensor in the shape of the dense weight, ``(R, C)``; float32 or float64."""
    return _as_blocks(grid, weight).sum((1, 3), dtype=accumulate_dtype(weight.dtype))


@torch.no_grad()
def zero_blocks_(grid: Grid, weight: Tensor, kept: Tensor) -> None:
    """Set the blocks of a dense weight to zero, in place, where ``kept (R, C)`` is False."""
    mask = kept[:, None, :, None].expand(grid.rows, grid.block[0], grid.cols, grid.block[1])
    weight.mul_(_as_weight(grid, mask))


def _as_weight(grid: Grid, blocks: Tensor) -> Tensor:
    """Return blocks ``(R, bo, C, bi)`` in the shape of the dense weight, without their phantom elements."""
    bo, bi = grid.block
    parts = blocks.reshape(grid.groups, grid.group_rows * bo, grid.taps, grid.tap_cols * bi)
    matrix = parts[:, : grid.group_out, :, : grid.tap_in].reshape(grid.out_features, grid.in_features)
    if grid.kernel is None:
        return matrix.t() if grid.transposed else matrix
    return matrix.view(grid.out_features, *grid.kernel, grid.tap_in).movedim(-1, 1)


def _as_blocks(grid: Grid, weight: Tensor) -> Tensor:
    """Return the dense weight as ``(R, bo, C, bi)``, padded with zeros at the edges of groups and taps."""
    if tuple(weight.shape) != grid.weight_shape:
        raise InputError(
            f"weight has shape {tuple(weight.shape)}; it must be that of the layer, {grid.weight_shape}",
            parameter="weight",
        )
    bo, bi = grid.block
    if grid.kernel is None:
        matrix = weight.t() if grid.transposed else weight
    else:
        matrix = weight.movedim(1, -1)
    parts = matrix.reshape(grid.groups, grid.group_out, grid.taps, grid.tap_in)
    below, right = grid.group_rows * bo - grid.group_out, grid.tap_cols * bi - grid.tap_in
    padded = torch.nn.functional.pad(parts, (0, right, 0, 0, 0, below))
    return padded.reshape(grid.rows, bo, grid.cols, bi)


@torch.no_grad()
def reblock(topology: Topology, values: Tensor, grid: Grid) -> tuple[Topology, Tensor]:
    """Re-cut blocks to another size, exactly: return the topology and the values of the new blocks.

    A block of ``grid`` is stored if it covers a stored element; new blocks are ordered by cell. Every stored element
    keeps its value, and the other elements of new blocks are zero. Memory is proportional to the stored elements, old
    and new.

    Args:
        topology: a valid topology.
        values: its values ``(Z, bo, bi)``.
        grid: the same matrix with other blocks, or with another number of groups.

    Raises:
        ValueError: ``grid`` is for another matrix.
    """
    if replace(grid, block=topology.grid.block, groups=topology.grid.groups) != topology.grid:
        raise InputError(
            f"grid is for a weight {grid.weight_shape}, and the blocks are of {topology.grid.weight_shape}; it must be "
            "the same weight",
            parameter="grid",
        )
    found = [torch.unique(key[real]) for _, key, _, real in _places(topology, grid)]
    keys = torch.unique(torch.cat(found)) if found else topology.row.new_empty(0, dtype=torch.int64)
    area = grid.block[0] * grid.block[1]
    stored = movable(values)
    new = stored.new_zeros(keys.shape[0] * area)
    for slots, key, offset, real in _places(topology, grid):
        at = torch.searchsorted(keys, key[real]) * area + offset[real]
        new[at] = stored[slots][real]
    return from_keys(grid, keys), moved(new.view(-1, *grid.block), values.dtype)


def _places(topology: Topology, grid: Grid) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield used slots ``(k,)``, and of their elements ``(k, bo, bi)`` the new cell, the offset in it, if real."""
    old, device = topology.grid, topology.row.device
    used = topology.used().nonzero().squeeze(1)
    down, right = (torch.arange(side, device=device) for side in old.block)
    for slots in used.split(max(1, CHUNK // (old.block[0] * old.block[1]))):
        row, col = topology.row[slots, None].long(), topology.col[slots, None].long()
        in_group = row % old.group_rows * old.block[0] + down
        channel = col % old.tap_cols * old.block[1] + right
        real = (in_group < old.group_out)[:, :, None] & (channel < old.tap_in)[:, None, :]
        element = row // old.group_rows * old.group_out + in_group  # row of the matrix
        inside = element % grid.group_out
        new_row = element // grid.group_out * grid.group_rows + inside // grid.block[0]
        new_col = col // old.tap_cols * grid.tap_cols + channel // grid.block[1]
        key = new_row[:, :, None] * grid.cols + new_col[:, None, :]
        offset = (inside % grid.block[0] * grid.block[1])[:, :, None] + (channel % grid.block[1])[:, None, :]
        yield slots, key, offset, real
