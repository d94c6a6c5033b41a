"""Parameters, FLOPs and bytes of sparse and dense layers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsekern.nn import BlockSparse, is_replaceable, left_dense
from sparsekern.nn.converters import known_classes
from sparsekern.topology import index_bytes


@dataclass(frozen=True)
class Account:
    """What one layer stores and computes: elements and FLOPs without phantom elements, bytes as allocated.

    ``flops`` are those of one training step on the given tokens, forward and both gradients: ``6 * tokens * elements``.
    The tokens of a convolution are the pixels of its output.

    Attributes:
        name, kind: names of the layer and of its class.
        shape: shape of the dense weight.
        block: ``(bo, bi)``, or None for a dense layer.
        blocks, cells: number of stored blocks, and of places for one.
        elements, bias: number of stored elements of the weight, and of entries of the bias.
        tokens: number of rows of the output, or of its pixels.
        values_bytes, index_bytes, gradient_bytes, state_bytes: bytes that training holds; the last are the optimizer's.
        dense_bytes: bytes that a dense layer of that shape would take.
        note: why a layer is left dense.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    block: tuple[int, int] | None
    blocks: int
    cells: int
    elements: int
    bias: int
    tokens: int
    values_bytes: int
    index_bytes: int
    gradient_bytes: int
    state_bytes: int
    dense_bytes: int
    note: str = ""

    @property
    def numel(self) -> int:
        """The number of elements of the dense weight."""
        return math.prod(self.shape)

    @property
    def sparsity(self) -> float:
        """The fraction of the weight that is not stored."""
        return 1 - self.elements / self.numel

    @property
    def parameters(self) -> int:
        """The number of trainable elements: stored elements and the bias."""
        return self.elements + self.bias

    @property
    def flops(self) -> int:
        """The floating point operations of one training step."""
        return 6 * self.tokens * self.elements

    @property
    def dense_flops(self) -> int:
        """The floating point operations of one training step of the dense layer."""
        return 6 * self.tokens * self.numel

    @property
    def total_bytes(self) -> int:
        """The bytes of values, index, gradient and optimizer state."""
        return self.values_bytes + self.index_bytes + self.gradient_bytes + self.state_bytes


def account(name: str, layer: nn.Module, tokens: int = 1, optimizer: torch.optim.Optimizer | None = None) -> Account:
    """Return the account of a sparse layer, or of a dense layer that can become sparse.

    Args:
        name: the layer's name in the model.
        layer: the layer.
        tokens: number of rows of its output, or of its pixels.
        optimizer: optimizer whose present state is counted; before the first step it has none.

    Raises:
        TypeError: the layer is neither.
    """
    bias = getattr(layer, "bias", None)
    bias_count = bias.numel() if isinstance(bias, Tensor) else 0
    weight: Tensor
    if isinstance(layer, BlockSparse):
        grid, weight = layer.grid, layer.values
        shape = grid.weight_shape
        block, cells = grid.block, grid.cells
        blocks, elements = layer.topology.blocks(), layer.topology.elements()
        index = index_bytes(grid, layer.topology.slots)
    elif is_replaceable(layer):
        assert isinstance(layer.weight, Tensor)
        weight, block, index = layer.weight, None, 0
        shape = tuple(weight.shape)
        blocks = cells = 0
        elements = weight.numel()
    else:
        raise TypeError(
            f"{name!r} is a {type(layer).__name__}; only sparse layers and {known_classes()} have an account"
        )
    size = weight.element_size()
    state = state_bytes(optimizer, weight)
    state_per_value = state / max(1, weight.numel())
    trains = weight.requires_grad
    return Account(
        name=name,
        kind=type(layer).__name__,
        shape=shape,
        block=block,
        blocks=blocks,
        cells=cells,
        elements=elements,
        bias=bias_count,
        tokens=tokens,
        values_bytes=weight.numel() * size,
        index_bytes=index,
        gradient_bytes=weight.numel() * size if trains else 0,
        state_bytes=state,
        note=left_dense(layer) or "",
        dense_bytes=round(math.prod(shape) * (size * (2 if trains else 1) + state_per_value)),
    )


def state_bytes(optimizer: torch.optim.Optimizer | None, parameter: Tensor) -> int:
    """Return the bytes of an optimizer's present state for one ``parameter (...)`` of any shape."""
    if optimizer is None:
        return 0
    states = optimizer.state.get(parameter, {}).values()
    return sum(s.numel() * s.element_size() for s in states if isinstance(s, Tensor))


def training_bytes(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Return the bytes that training holds between steps: parameters, gradients, buffers and optimizer state.

    Gradients are counted for every parameter that requires them, whether or not they exist now.
    """
    total = sum(b.numel() * b.element_size() for b in model.buffers())
    for parameter in model.parameters():
        size = parameter.numel() * parameter.element_size()
        total += size * (2 if parameter.requires_grad else 1) + state_bytes(optimizer, parameter)
    return total


def stored_parameters(model: nn.Module) -> int:
    """Return the number of parameters of a model without phantom elements and free slots."""
    total = sum(p.numel() for p in model.parameters())
    for layer in model.modules():
        if isinstance(layer, BlockSparse):
            total += layer.topology.elements() - layer.values.numel()
    return total


def network_sparsity(model: nn.Module) -> float:
    """Return the fraction of all weights of a model, including dense layers and embeddings, that is not stored.

    Weights are the matrices of sparse layers and all parameters with two or more dimensions, counted once. A model
    with sparse layers at 90 % is less sparse than that, depending on what stays dense; 0 without any weight.
    """
    stored = whole = 0
    matrices = {id(layer.values): layer for layer in model.modules() if isinstance(layer, BlockSparse)}
    for parameter in model.parameters():
        if (layer := matrices.get(id(parameter))) is not None:
            stored, whole = stored + layer.topology.elements(), whole + layer.grid.numel
        elif parameter.dim() > 1:
            stored, whole = stored + parameter.numel(), whole + parameter.numel()
    return 1 - stored / whole if whole else 0.0
