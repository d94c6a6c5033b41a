"""Conversion of state dicts, without a model, between dense weights, stored blocks, and torch's BSR tensors."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Container, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from sparsekern.errors import InputError
from sparsekern.files.size_limits import DEFAULT, Limits
from sparsekern.files.states import Metadata, StoredLayer, metadata_of, stored_layers, with_metadata
from sparsekern.nn.layer_state import LAYER_VERSION, STORED, describe
from sparsekern.topology import (
    Grid,
    Topology,
    allocate,
    by_norm,
    conv_grid,
    dense_block_norms,
    from_keys,
    gather_blocks,
    reblock,
    to_dense,
)

State = OrderedDict[str, Tensor]

EIGHT_BIT = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz)
"""Eight-bit floating point dtypes of weights; other one-byte dtypes are scales or hold two numbers per byte."""


def dense_state(state: Mapping[str, Tensor], limits: Limits = DEFAULT) -> State:
    """Return the state dict with every sparse layer and every BSR tensor replaced by a dense weight.

    Args:
        state: the state dict; not changed.
        limits: limits on the memory it may ask for.

    Raises:
        ValueError: the state dict does not hold the sizes of a layer, or exceeds the limits.
    """
    layers = stored_layers(state)
    _check_room(state, sum(_dense_bytes(_known(layer)) for layer in layers.values()), limits)
    return _replaced(state, layers, lambda name: {"weight": to_dense(layers[name].topology, layers[name].values)})


def bsr_state(state: Mapping[str, Tensor], limits: Limits = DEFAULT) -> State:
    """Return the state dict with every sparse linear layer replaced by a ``torch.sparse_bsr`` weight.

    Convolutions and transposed weights become dense: torch has no such BSR tensors.

    Raises:
        ValueError: as for :func:`dense_state`; or the blocks do not divide a matrix, as BSR tensors require.
    """
    layers = stored_layers(state)
    wanted = [
        layer.topology.grid.rows * 8 if _known(layer).topology.grid.kernel is None else _dense_bytes(layer)
        for layer in layers.values()
    ]
    _check_room(state, sum(wanted), limits)
    return _replaced(state, layers, lambda name: {"weight": _to_bsr(layers[name])})


def sparse_state(
    state: Mapping[str, Tensor],
    *,
    sparsity: float | None,
    block: tuple[int, int] | None,
    chosen: Callable[[str], bool] = lambda name: True,
    limits: Limits = DEFAULT,
) -> State:
    """Return the state dict with the weights of linear layers and convolutions replaced by stored blocks.

    These are the floating point tensors ``<name>.weight`` with two to four dimensions, except depthwise convolutions
    and stems (at most three input channels). Layers that are already sparse are re-cut to blocks of size ``block``.

    Args:
        state: a state dict with dense weights, sparse layers or BSR tensors; not changed.
        sparsity: fraction of each layer's blocks to leave out, those of smallest norm. None: the conversion is exact,
            and keeps every stored block and every block with a nonzero element.
        block: block size ``(out, in)``. None keeps the block size of sparse layers, and is an error for dense ones.
        chosen: function of a layer's name that returns whether to convert it.
        limits: limits on the memory the state dict may ask for; the norms of a sparse layer need its dense weight.

    Raises:
        ValueError: the state dict does not hold the sizes of a layer, has no layer to convert, or exceeds the limits.
    """
    state = with_metadata(state, metadata_of(state))
    found: dict[str, tuple[Topology, Tensor]] = {}
    layers = {name: layer for name, layer in stored_layers(state).items() if chosen(name)}
    if sparsity is not None:
        _check_room(state, max((_dense_bytes(_known(layer)) for layer in layers.values()), default=0), limits)
    for name, layer in layers.items():
        _check_block(name, _known(layer).topology.grid, block)
        found[name] = _cut(layer, sparsity, block)
    for name in [key.removesuffix(".weight") for key, tensor in state.items() if _is_weight(key, tensor)]:
        name = "" if name == "weight" else name
        if chosen(name):
            weight = state[f"{name}.weight".lstrip(".")]
            if block is None:
                raise InputError(
                    "block_size is missing; it must be given to convert dense weights", parameter="block_size"
                )
            grid = _grid(weight, block)
            _check_block(name, grid, block)
            found[name] = _choose(weight, grid, sparsity)
    if not found:
        raise InputError("nothing to convert: the file has no chosen weight of a linear layer or convolution")
    metadata = {
        name: {"version": LAYER_VERSION, "grid": describe(topology.grid)} for name, (topology, _) in found.items()
    }

    def stored(name: str) -> dict[str, Tensor]:
        topology, values = found[name]
        return {"values": values, "row": topology.row, "col": topology.col}

    return _replaced(state, found, stored, metadata)


def _is_weight(key: str, tensor: Tensor) -> bool:
    named = key == "weight" or key.endswith(".weight")
    if not (named and tensor.layout == torch.strided and tensor.is_floating_point() and tensor.numel()):
        return False
    if tensor.dtype.itemsize == 1 and tensor.dtype not in EIGHT_BIT:
        return False
    return tensor.dim() == 2 or (tensor.dim() in (3, 4) and tensor.shape[1] > 3)


def _grid(weight: Tensor, block: tuple[int, int]) -> Grid:
    if weight.dim() == 2:
        return Grid(weight.shape[0], weight.shape[1], block)
    return conv_grid(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), block)


def _check_block(name: str, grid: Grid, block: tuple[int, int] | None) -> None:
    """Raise ValueError if a block is larger than the whole layer, so that padding would be stored."""
    if block is not None and block[0] > grid.group_out and block[1] > grid.tap_in:
        raise InputError(
            f"block_size is {block[0]}x{block[1]}, larger than layer {name!r} of {grid.group_out} x "
            f"{grid.tap_in}; choose smaller blocks, or leave the layer as it is",
            parameter="block_size",
        )


def _choose(weight: Tensor, grid: Grid, sparsity: float | None) -> tuple[Topology, Tensor]:
    if sparsity is not None:
        topology = by_norm(grid, weight, allocate([grid], sparsity)[0])
    else:
        # nan and inf count as nonzero; a layer of zeros keeps its first block, because a layer needs one
        comparable = weight.float() if weight.dtype in EIGHT_BIT else weight
        nonzero = (comparable != 0).to(torch.float32)
        keys = (dense_block_norms(grid, nonzero) > 0).flatten().nonzero().squeeze(1)
        topology = from_keys(grid, keys if keys.numel() else keys.new_zeros(1))
    return topology, gather_blocks(topology, weight)


def _cut(layer: StoredLayer, sparsity: float | None, block: tuple[int, int] | None) -> tuple[Topology, Tensor]:
    old = layer.topology.grid
    grid = replace(old, block=block or old.block)
    if sparsity is not None:
        return _choose(to_dense(layer.topology, layer.values), grid, sparsity)
    if grid == old:
        return layer.topology, layer.values
    topology, values = reblock(layer.topology, layer.values, grid)
    if topology.slots == 0:
        topology, values = from_keys(grid, values.new_zeros(1, dtype=torch.int64)), values.new_zeros(1, *grid.block)
    return topology, values


def _to_bsr(layer: StoredLayer) -> Tensor:
    topology, grid = layer.topology, layer.topology.grid
    if grid.kernel is not None or grid.transposed:
        return to_dense(topology, layer.values)
    if grid.has_edge:
        fits = [
            max(side for side in range(1, most + 1) if size % side == 0)
            for size, most in zip((grid.out_features, grid.in_features), grid.block, strict=True)
        ]
        raise InputError(
            f"layer {layer.name!r} is {grid.out_features} x {grid.in_features} in blocks of {grid.block[0]}x"
            f"{grid.block[1]}, which do not divide it as torch's BSR requires; first convert it to sparse, keeping "
            f"zeros, with a block_size that does, such as {fits[0]}x{fits[1]}"
        )
    order = topology.keys().argsort(stable=True)[: topology.blocks()]
    row, col = topology.row[order].long(), topology.col[order].long()
    crow = row.new_zeros(grid.rows + 1)
    crow[1:] = torch.bincount(row, minlength=grid.rows).cumsum(0)
    size = (grid.out_features, grid.in_features)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse BSR tensor support is in beta")
        return torch.sparse_bsr_tensor(crow, col, layer.values[order], size, check_invariants=True)


def _known(layer: StoredLayer) -> StoredLayer:
    if not layer.described:
        raise InputError(
            f"the file does not hold the size of layer {layer.name!r}; load it into the model with sparsekern.load_, "
            "and save that with sparsekern.save"
        )
    return layer


def _dense_bytes(layer: StoredLayer) -> int:
    """Return the bytes of the dense weight of a layer, padded to whole blocks."""
    grid, (bo, bi) = layer.topology.grid, layer.topology.grid.block
    return grid.rows * bo * grid.cols * bi * layer.values.element_size()


def _check_room(state: Mapping[str, Tensor], wanted: int, limits: Limits) -> None:
    """Raise ValueError if a conversion needs more memory than the limits allow."""
    stored = sum(tensor.nbytes for tensor in state.values() if tensor.layout == torch.strided)
    limits.check_bytes("what is converted", wanted, stored)


def _replaced(
    state: Mapping[str, Tensor],
    layers: Container[str],
    convert: Callable[[str], dict[str, Tensor]],
    metadata: Metadata | None = None,
) -> State:
    """Return the state dict with each of the ``layers`` replaced by what ``convert`` returns for its name.

    The ``metadata`` of the new layers replace those of the old ones.
    """
    new: State = OrderedDict()
    for key, tensor in state.items():
        name, _, part = key.rpartition(".")
        if name not in layers or part not in (*STORED, "weight"):
            new[key] = tensor
        elif part in ("values", "weight"):
            new.update((f"{name}.{kind}".lstrip("."), made) for kind, made in convert(name).items())
    kept = {name: entry for name, entry in metadata_of(state).items() if name not in layers}
    return with_metadata(new, kept | (metadata or {}))
