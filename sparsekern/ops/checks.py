"""The checks of an op's arguments. Kernels check nothing; only the native ones check the entries of an index."""

from __future__ import annotations

from collections.abc import Sequence
from operator import mul

import torch
from torch import Tensor

from sparsekern.errors import InputError
from sparsekern.kernels.contract import PADDING, ConvShape, Index
from sparsekern.ops.probes import KINDS, Probe
from sparsekern.topology import Grid, current_index

INT32 = torch.int32


def check_linear(x: Tensor, values: Tensor, bias: Tensor | None, index: Index, grid: Grid, probe: Probe | None) -> None:
    """Raise ValueError or TypeError unless the arguments of :func:`sparsekern.ops.linear` fit together."""
    _check_tensor(x)
    if x.dim() == 0 or x.shape[-1] != grid.in_features:
        raise InputError(
            f"input has shape {tuple(x.shape)}; its last axis must be in_features = {grid.in_features}",
            parameter="input",
        )
    _check_weight(x, values, bias, index, grid, probe)


def check_conv2d(
    x: Tensor, values: Tensor, bias: Tensor | None, index: Index, grid: Grid, shape: ConvShape, probe: Probe | None
) -> None:
    """Raise ValueError or TypeError unless the arguments of :func:`sparsekern.ops.conv2d` fit together."""
    wanted = (shape.out_channels, shape.group_in, *shape.kernel)
    kernel = None if grid.kernel is None else (1, *grid.kernel)[-2:]  # in one dimension: a single row
    if (grid.out_features, grid.tap_in, *(kernel or ())) != wanted or grid.groups != shape.groups:
        raise InputError(
            f"the grid is for a weight {grid.weight_shape} in {grid.groups} groups, "
            f"the convolution has {wanted} in {shape.groups}; make it with conv_grid"
        )
    _check_tensor(x)
    if x.dim() not in (3, 4) or x.shape[-3] != shape.in_channels:
        raise InputError(
            f"input has shape {tuple(x.shape)}; it must be (N, C, H, W) or (C, H, W) with C = in_channels = "
            f"{shape.in_channels}",
            parameter="input",
        )
    if min(shape.output_size(x.shape[-2], x.shape[-1])) < 1:
        raise InputError(
            f"input has shape {tuple(x.shape)}, which is smaller than the kernel {shape.kernel} of dilation "
            f"{shape.dilation} with padding {shape.padding} (top, bottom, left, right)",
            parameter="input",
        )
    _check_weight(x, values, bias, index, grid, probe)


def _check_tensor(x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"input is a {type(x).__name__}; it must be a torch.Tensor: convert it with torch.as_tensor")
    if x.layout is not torch.strided or x.is_nested:
        layout, way_out = ("nested", "to_padded_tensor(0)") if x.is_nested else (x.layout, "to_dense()")
        raise TypeError(f"input is a {layout} tensor; a sparse layer takes dense ones: convert it with .{way_out}")
    if not torch.compiler.is_compiling():  # before anything copies it
        check_storage(x)


def check_storage(*tensors: Tensor | None) -> None:
    """Raise ValueError if the storage of a tensor was resized and is too small for it."""
    for tensor in tensors:
        if tensor is None:
            continue
        held = tensor.untyped_storage().nbytes()  # a symbol in traces, where a tensor has no number of bytes either
        if type(held) is int and (size := tensor.nbytes) and held < _end(tensor, size):
            raise InputError(
                f"a tensor of shape {tuple(tensor.shape)} has a storage of {held} bytes, too small for it: it was "
                "resized, as FSDP does outside of its modules' forward; restore it before the call"
            )


def _end(tensor: Tensor, size: int) -> int:
    """Return where the last number of a tensor of ``size`` bytes, not empty, ends in its storage, in bytes."""
    if tensor.is_contiguous():
        return size + int(tensor.storage_offset()) * tensor.element_size()
    strides = tensor.stride()
    last = sum(map(mul, tensor.shape, strides)) - sum(strides)
    return int(tensor.storage_offset() + last + 1) * tensor.element_size()


def _check_weight(
    x: Tensor, values: Tensor, bias: Tensor | None, index: Index, grid: Grid, probe: Probe | None
) -> None:
    if values.layout is not torch.strided or (bias is not None and bias.layout is not torch.strided):
        layouts = values.layout, None if bias is None else bias.layout
        raise TypeError(f"values and bias are {layouts[0]} and {layouts[1]} tensors; they must be dense")
    shape = values.shape
    if len(shape) != 3 or (shape[1], shape[2]) != grid.block:
        raise InputError(
            f"values has shape {tuple(shape)}; it must be (slots, {grid.block[0]}, {grid.block[1]})", parameter="values"
        )
    slots = index.row_slot.numel() - PADDING
    rows, cols = index.row_ptr.numel() - 1, index.col_ptr.numel() - 1
    if slots != shape[0] or rows != grid.rows or cols != grid.cols:
        raise InputError(
            f"the index is for {slots} slots in {rows} x {cols} blocks; values has {shape[0]} slots and the grid "
            f"{grid.rows} x {grid.cols} blocks"
        )
    if bias is not None and bias.shape != (grid.out_features,):
        raise InputError(f"bias has shape {tuple(bias.shape)}; it must be ({grid.out_features},)", parameter="bias")
    device = x.device
    if values.device != device or index.row_ptr.device != device or (bias is not None and bias.device != device):
        for name, tensor in (("values", values), ("bias", bias), ("the index", index.row_ptr)):
            if tensor is not None and tensor.device != device:
                raise InputError(
                    f"input is on {device} but {name} on {tensor.device}; move one of them with .to()",
                    parameter="input",
                )
    _check_dtypes(x, values, bias)
    if probe is not None:
        _check_probe(probe, x, grid)


def _check_dtypes(x: Tensor, values: Tensor, bias: Tensor | None) -> None:
    dtype = x.dtype
    same, bias_same = values.dtype is dtype, bias is None or bias.dtype is values.dtype
    if same and bias_same and dtype.is_floating_point:
        return
    if not (dtype.is_floating_point and values.dtype.is_floating_point):
        raise TypeError(f"input is {dtype} and values are {values.dtype}; both must be real floating point")
    device_type = x.device.type
    # The meta device has no autocast; torch.amp.is_autocast_available says so, but PyTorch 2.11 cannot compile it.
    autocast = device_type != "meta" and torch.is_autocast_enabled(device_type)
    if autocast and torch.float64 not in (dtype, values.dtype):
        return  # autocast casts the input, and the kernels round what they read of the values
    if not same:
        raise TypeError(
            f"input is {dtype} but values are {values.dtype}; convert one with .to(), or use torch.autocast"
        )
    assert bias is not None
    raise TypeError(f"bias is {bias.dtype} but values are {values.dtype}; they must be the same")


def legal_index(lists: Sequence[Tensor], slots_block: Sequence[int], *tensors: Tensor | None) -> Index:
    """Return the index that an op was given, checked: kernels read it at its addresses.

    The implementations of the ops call this, so the arguments of a compiled or exported program are checked too.

    Args:
        lists: the six tensors of the index.
        slots_block: ``(Z, bo, bi)``.
        tensors: what the kernels read beside the index; None is one that is absent.

    Raises:
        ValueError: a list is not int32, not contiguous or of another length, or the storage of a tensor was resized;
            or other code has overwritten what the index was built from.
    """
    index = current_index(lists)
    row_ptr, row_col, row_slot, col_ptr, col_row, col_slot = index
    slots, bo, bi = slots_block
    entries = slots + PADDING
    others = slots if bo == bi == 1 else entries
    # This runs in each forward and backward: written out it takes a quarter of the time of a loop.
    if not (
        row_ptr.dtype is row_col.dtype is row_slot.dtype is col_ptr.dtype is col_row.dtype is col_slot.dtype is INT32
        and row_slot.numel() == col_slot.numel() == entries
        and row_col.numel() == col_row.numel() == others
        and row_ptr.is_contiguous()
        and row_col.is_contiguous()
        and row_slot.is_contiguous()
        and col_ptr.is_contiguous()
        and col_row.is_contiguous()
        and col_slot.is_contiguous()
    ):
        raise InputError(_what_is_wrong(index, (-1, others, entries, -1, others, entries), slots))
    check_storage(*tensors)
    return index


def _what_is_wrong(index: Index, lengths: tuple[int, ...], slots: int) -> str:
    wrong = (
        f"{name} of the index is {tensor.dtype} of shape {tuple(tensor.shape)} and strides {tensor.stride()}; "
        f"it must be contiguous, torch.int32 and for {slots} slots: make it with build_index, of a layer with "
        "sparsekern.refresh_(model)"
        for name, tensor, length in zip(Index._fields, index, lengths, strict=True)
        if tensor.dtype is not INT32 or not tensor.is_contiguous() or length not in (-1, tensor.numel())
    )
    return next(wrong)


def _check_probe(probe: Probe, x: Tensor, grid: Grid) -> None:
    """Raise ValueError unless a probe is of a known kind and of the shape that the grid asks for."""
    if torch._C._get_tracing_state() is not None:
        return  # a traced graph leaves the probe out: its sizes are tensors here
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
        raise InputError(f"probe kind is {probe.kind!r}; it must be one of {', '.join(KINDS)}")
    if tuple(probe.tensor.shape) != wanted:
        raise InputError(
            f"the probe for {probe.kind!r} has shape {tuple(probe.tensor.shape)}; on this layer it must be {wanted}"
        )
    if probe.tensor.device != x.device:
        raise InputError(
            f"input is on {x.device} but the probe on {probe.tensor.device}; make the probe there", parameter="input"
        )
