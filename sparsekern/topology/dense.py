"""Between a dense weight and its stored blocks. Only conversion comes here; training never does."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekern.errors import InputError
from sparsekern.kernels.contract import accumulate_dtype
from sparsekern.topology.grid import Grid
from sparsekern.topology.topology import Topology


@torch.no_grad()
def to_dense(topology: Topology, values: Tensor) -> Tensor:
    """Return the dense weight, in the grid's shape: ``values (Z, bo, bi)`` at their places, zero elsewhere."""
    grid, (bo, bi) = topology.grid, topology.grid.block
    used = topology.used()
    row, col = topology.row[used].long(), topology.col[used].long()
    stored = movable(values)
    dense = stored.new_zeros(grid.rows, bo, grid.cols, bi)
    dense[row, :, col, :] = stored[used]
    parts = dense.view(grid.groups, grid.group_rows * bo, grid.taps, grid.tap_cols * bi)
    matrix = parts[:, : grid.group_out, :, : grid.tap_in].reshape(grid.out_features, grid.in_features)
    matrix = moved(matrix, values.dtype)
    if grid.kernel is None:
        return matrix.t().contiguous() if grid.transposed else matrix
    return matrix.view(grid.out_features, *grid.kernel, grid.tap_in).movedim(-1, 1).contiguous()


@torch.no_grad()
def gather_blocks(topology: Topology, weight: Tensor) -> Tensor:
    """Return ``values (Z, bo, bi)``: the blocks of a dense ``weight`` at the topology's places.

    Free slots and phantom elements are zero.

    Raises:
        ValueError: the weight has another shape than the grid.
    """
    blocks = _as_blocks(topology.grid, movable(weight))
    values = blocks[topology.row.clamp(min=0).long(), :, topology.col.clamp(min=0).long(), :]
    return moved(values.masked_fill_(~topology.used().view(-1, 1, 1), 0), weight.dtype)


def movable(values: Tensor) -> Tensor:
    """Return numbers as PyTorch can copy and zero them: eight-bit floating point ones as their bytes."""
    return values.view(torch.uint8) if values.is_floating_point() and values.dtype.itemsize == 1 else values


def moved(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what came from :func:`movable` in its own dtype again."""
    return values if values.dtype == dtype else values.view(dtype)


@torch.no_grad()
def dense_block_norms(grid: Grid, weight: Tensor) -> Tensor:
    """Return the Frobenius norm of every block of a dense weight, ``(R, C)``; float32 (float64 for float64)."""
    if weight.dtype.itemsize == 1:
        weight = weight.float()  # PyTorch has no arithmetic on eight-bit floating point numbers
    norms: Tensor = torch.linalg.vector_norm(_as_blocks(grid, weight), dim=(1, 3), dtype=accumulate_dtype(weight.dtype))
    return norms


def _as_blocks(grid: Grid, weight: Tensor) -> Tensor:
    """Return the dense weight as ``(R, bo, C, bi)``, filled up with zeros at the edges of groups and taps."""
    if tuple(weight.shape) != grid.weight_shape:
        raise InputError(
            f"weight has shape {tuple(weight.shape)}; the layer is {grid.weight_shape}", parameter="weight"
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
