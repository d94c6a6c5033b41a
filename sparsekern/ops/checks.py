"""Every user error of an op, raised once, here. Kernels check nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekern.kernels.contract import ConvShape, Index
from sparsekern.ops.probes import KINDS, Probe
from sparsekern.topology import Grid


def check_linear(x: Tensor, values: Tensor, bias: Tensor | None, index: Index, grid: Grid) -> None:
    """Raise ValueError or TypeError unless the arguments of :func:`sparsekern.ops.linear` fit together."""
    _check_tensor(x)
    if x.dim() == 0 or x.shape[-1] != grid.in_features:
        raise ValueError(f"input has shape {tuple(x.shape)}; its last axis must be in_features = {grid.in_features}")
    _check_weight(x, values, bias, index, grid)


def check_conv2d(x: Tensor, values: Tensor, bias: Tensor | None, index: Index, grid: Grid, shape: ConvShape) -> None:
    """Raise ValueError or TypeError unless the arguments of :func:`sparsekern.ops.conv2d` fit together."""
    wanted = (shape.out_channels, shape.group_in, *shape.kernel)
    kernel = None if grid.kernel is None else (1, *grid.kernel)[-2:]  # in one dimension: a single row
    if (grid.out_features, grid.tap_in, *(kernel or ())) != wanted or grid.groups != shape.groups:
        raise ValueError(
            f"the grid is for a weight {grid.weight_shape} in {grid.groups} groups, "
            f"the convolution has {wanted} in {shape.groups}; make it with conv_grid"
        )
    _check_tensor(x)
    if x.dim() not in (3, 4) or x.shape[-3] != shape.in_channels:
        raise ValueError(
            f"input has shape {tuple(x.shape)}; it must be (N, C, H, W) or (C, H, W) with C = in_channels = "
            f"{shape.in_channels}"
        )
    if min(shape.output_size(x.shape[-2], x.shape[-1])) < 1:
        raise ValueError(
            f"input has shape {tuple(x.shape)}, which is smaller than the kernel {shape.kernel} of dilation "
            f"{shape.dilation} with padding {shape.padding} (top, bottom, left, right)"
        )
    _check_weight(x, values, bias, index, grid)


def _check_tensor(x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"input is a {type(x).__name__}; it must be a torch.Tensor: convert it with torch.as_tensor")


def _check_weight(x: Tensor, values: Tensor, bias: Tensor | None, index: Index, grid: Grid) -> None:
    if values.dim() != 3 or tuple(values.shape[1:]) != grid.block:
        raise ValueError(
            f"values has shape {tuple(values.shape)}; it must be (slots, {grid.block[0]}, {grid.block[1]})"
        )
    if (index.slots, index.row_ptr.shape[0], index.col_ptr.shape[0]) != (
        values.shape[0],
        grid.rows + 1,
        grid.cols + 1,
    ):
        raise ValueError(
            f"the index is for {index.slots} slots in {index.row_ptr.shape[0] - 1} x {index.col_ptr.shape[0] - 1} "
            f"blocks; values has {values.shape[0]} slots and the grid {grid.rows} x {grid.cols} blocks"
        )
    if bias is not None and tuple(bias.shape) != (grid.out_features,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be ({grid.out_features},)")
    for name, tensor in (("values", values), ("bias", bias), ("the index", index.row_ptr)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"input is on {x.device} but {name} on {tensor.device}; move one of them with .to()")
    _check_dtypes(x, values, bias)


def _check_dtypes(x: Tensor, values: Tensor, bias: Tensor | None) -> None:
    if not (x.is_floating_point() and values.is_floating_point()):
        raise TypeError(f"input is {x.dtype} and values are {values.dtype}; both must be real floating point")
    device_type = x.device.type
    # The meta device has no autocast; torch.amp.is_autocast_available says so, but PyTorch 2.11 cannot compile it.
    autocast = device_type != "meta" and torch.is_autocast_enabled(device_type)
    if autocast and torch.float64 not in (x.dtype, values.dtype):
        return  # autocast casts the input, and the kernels round what they read of the values
    if x.dtype != values.dtype:
        raise TypeError(
            f"input is {x.dtype} but values are {values.dtype}; convert one with .to(), or use torch.autocast"
        )
    if bias is not None and bias.dtype != values.dtype:
        raise TypeError(f"bias is {bias.dtype} but values are {values.dtype}; they must be the same")


def check_probe(probe: Probe, x: Tensor, grid: Grid) -> None:
    """Raise ValueError unless a probe is of a known kind and of the shape that the grid asks for."""
    rows_cols = (grid.rows, grid.cols)
    wanted: tuple[int, ...]
    if probe.kind == "candidates":
        wanted = (Index(*probe.args).slots, *grid.block)
    elif probe.kind == "norms":
        wanted = tuple(probe.args[0].shape)
    elif probe.kind == "all_norms":
        wanted = rows_cols
    elif probe.kind == "counted_norms":
        wanted = (grid.rows * grid.cols + 1,)
    elif probe.kind == "sketch":
        wanted = (probe.args[0].shape[0], *rows_cols)
    elif probe.kind == "magnitudes":
        wanted = (grid.rows + grid.groups * grid.cols,)
    elif probe.kind == "signed_sums":
        wanted = (grid.out_features + grid.groups * grid.in_features,)
    else:
        raise ValueError(f"probe kind is {probe.kind!r}; it must be one of {', '.join(KINDS)}")
    if tuple(probe.tensor.shape) != wanted:
        raise ValueError(
            f"the probe for {probe.kind!r} has shape {tuple(probe.tensor.shape)}; on this layer it must be {wanted}"
        )
    if probe.tensor.device != x.device:
        raise ValueError(f"input is on {x.device} but the probe on {probe.tensor.device}; make the probe there")
