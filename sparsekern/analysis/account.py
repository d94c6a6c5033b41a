"""Parameters, FLOPs and bytes of a layer, sparse and dense; numbers only."""

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
    """What one layer stores and computes. Elements and FLOPs count real elements, bytes count what is allocated.

    ``flops`` are those of one training step on the given tokens: forward and both gradients, ``6 * tokens * elements``.
    The tokens of a convolution are the pixels of its output.

    Attributes:
        name, kind: of the layer, and of its class.
        shape: of the dense weight.
        block: ``(bo, bi)``; None of a dense layer.
        blocks, cells: stored blocks, and places for one.
        elements, bias: stored elements of the weight, and entries of the bias.
        tokens: rows of the output, or its pixels.
        values_bytes, index_bytes, gradient_bytes, state_bytes: what training holds; the last is the optimizer's.
        dense_bytes: what a dense layer of that shape would take.
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
        """Elements of the whole weight."""
        return math.prod(self.shape)

    @property
    def sparsity(self) -> float:
        """Fraction of the weight that is absent."""
        return 1 - self.elements / self.numel

    @property
    def parameters(self) -> int:
        """Trainable numbers: stored real elements and the bias."""
        return self.elements + self.bias

    @property
    def flops(self) -> int:
        """Floating point operations of one training step."""
        return 6 * self.tokens * self.elements

    @property
    def dense_flops(self) -> int:
        """The same for the dense layer."""
        return 6 * self.tokens * self.numel

    @property
    def total_bytes(self) -> int:
        """Bytes of training state: values, index, gradient and optimizer state."""
        return self.values_bytes + self.index_bytes + self.gradient_bytes + self.state_bytes


def account(name: str, layer: nn.Module, tokens: int = 1, optimizer: torch.optim.Optimizer | None = None) -> Account:
    """Return the account of a sparse layer, or of a dense one of a class that can become sparse.

    Args:
        name: the layer's name in the model.
        layer: the layer.
        tokens: rows of its output; of a convolution its pixels.
        optimizer: counted as it is now: before the first step it has no state.

    Raises:
        TypeError: another kind of layer.
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
    """Return the bytes of an optimizer's state for one ``parameter (...)`` of any shape, as it is now."""
    if optimizer is None:
        return 0
    states = optimizer.state.get(parameter, {}).values()
    return sum(s.numel() * s.element_size() for s in states if isinstance(s, Tensor))


def training_bytes(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Return the bytes that training holds between steps: parameters, their gradients, buffers, optimizer state.

    Gradients are counted for every parameter that trains, whether or not they exist at the moment.
    """
    total = sum(b.numel() * b.element_size() for b in model.buffers())
    for parameter in model.parameters():
        size = parameter.numel() * parameter.element_size()
        total += size * (2 if parameter.requires_grad else 1) + state_bytes(optimizer, parameter)
    return total


def stored_parameters(model: nn.Module) -> int:
    """Return the trainable numbers of a model, phantom elements and free slots not counted."""
    total = sum(p.numel() for p in model.parameters())
    for layer in model.modules():
        if isinstance(layer, BlockSparse):
            total += layer.topology.elements() - layer.values.numel()
    return total


def network_sparsity(model: nn.Module) -> float:
    """Return the fraction absent of all weights of a model, dense layers and embeddings included; 0 without any.

    Weights are parameters of two axes or more, however often they are used, and the matrices of sparse layers. So a
    model whose sparse layers lack 90 % has less than that, according to what stays dense.
    """
    stored = whole = 0
    matrices = {id(layer.values): layer for layer in model.modules() if isinstance(layer, BlockSparse)}
    for parameter in model.parameters():
        if (layer := matrices.get(id(parameter))) is not None:
            stored, whole = stored + layer.topology.elements(), whole + layer.grid.numel
        elif parameter.dim() > 1:
            stored, whole = stored + parameter.numel(), whole + parameter.numel()
    return 1 - stored / whole if whole else 0.0
