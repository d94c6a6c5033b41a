"""Sparse layers in the likeness of a dense one, with other sizes."""

from __future__ import annotations

import math
from typing import Any, TypeGuard

from torch import nn

from sparsekern.errors import InputError
from sparsekern.nn import BlockSparse, SparseConv2d, SparseLinear
from sparsekern.nn.conv import conv_arguments
from sparsekern.topology import check_sparsity

Dense = nn.Linear | nn.Conv2d

POINTWISE: dict[str, Any] = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1, "padding_mode": "zeros"}


def has_twin(module: nn.Module, name: str = "") -> TypeGuard[Dense]:
    """Return whether a layer is of a kind that transforms know. A selector."""
    return isinstance(module, (nn.Linear, nn.Conv2d))


def check(layer: nn.Module, sparsity: float, pool: float) -> None:
    """Raise ValueError or TypeError where no transform fits a layer, or a number is out of range."""
    check_sparsity(sparsity)
    if not 1 <= pool < math.inf:
        raise InputError(f"pool is {pool}; it must be 1 or more", parameter="pool")
    if type(layer) not in (nn.Linear, nn.Conv2d):
        raise TypeError(f"layer is a {type(layer).__name__}; it must be an nn.Linear or nn.Conv2d")
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        raise InputError(
            f"layer has groups = {layer.groups}; Sparse-IFT is defined for convolutions of one group: leave it dense",
            parameter="layer",
        )


def features(layer: Dense) -> tuple[int, int]:
    """Return input and output features, or channels."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels


def dense_twin(layer: Dense, ins: int, outs: int, *, pointwise: bool = False, bias: bool, device: Any = None) -> Dense:
    """Return a dense layer of the same kind with other features; ``pointwise``: a convolution of one tap.

    On the layer's device, or that given: ``"meta"`` for one that only has sizes.
    """
    placed: dict[str, Any] = {"device": layer.weight.device if device is None else device, "dtype": layer.weight.dtype}
    if isinstance(layer, nn.Linear):
        return nn.Linear(ins, outs, bias, **placed)
    arguments = conv_arguments(layer) | (POINTWISE if pointwise else {})
    return nn.Conv2d(**(arguments | {"in_channels": ins, "out_channels": outs, "bias": bias}), **placed)


def norm_of(layer: Dense, features: int) -> nn.Module:
    """Return batch norm for so many features in the likeness of a convolution; of a linear layer an identity."""
    if isinstance(layer, nn.Linear):
        return nn.Identity()
    return nn.BatchNorm2d(features, device=layer.weight.device, dtype=layer.weight.dtype)


def sparse_twin(twin: Dense, blocks: int, block: tuple[int, int], *, layer: Dense, seed: int, name: str) -> BlockSparse:
    """Return the sparse layer of a twin's sizes, on the device of ``layer``, and trained if that is."""
    options: dict[str, Any] = {"block_size": block, "blocks": blocks, "seed": seed, "name": name}
    options |= {"device": layer.weight.device, "dtype": layer.weight.dtype}
    sparse: BlockSparse
    if isinstance(twin, nn.Linear):
        sparse = SparseLinear(twin.in_features, twin.out_features, twin.bias is not None, **options)
    else:
        sparse = SparseConv2d(**conv_arguments(twin), **options)
    sparse.values.requires_grad_(layer.weight.requires_grad)
    return sparse
