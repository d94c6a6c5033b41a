"""Parameters, FLOPs and bytes of sparse and dense layers, the table of them, and the peak memory of a call."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.analysis.layer_race import kind_of, layer_inputs, time_layer
from sparsekern.analysis.profile import profile
from sparsekern.errors import InputError
from sparsekern.nn import BlockSparse, DenseShare, dense_share, is_replaceable, left_dense, refuse_sharded
from sparsekern.nn.converters import known_classes
from sparsekern.topology import index_bytes
from sparsekern.topology.arguments import check_kind


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


def peak_above(run: Callable[[], object], device: torch.device) -> int:
    """Run once and return the peak of the bytes held by PyTorch's allocators, above those held before.

    Memory that native kernels allocate themselves is not counted.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # PyTorch 2.13 writes lines to stderr
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return int(max(accumulate((event.nbytes() for event in events), initial=0)))


MIB = 2**20

BYTES = ("values_bytes", "index_bytes", "gradient_bytes", "state_bytes", "total_bytes", "dense_bytes")


@dataclass(frozen=True)
class Summary:
    """The accounts of a model's sparse and dense layers; ``print`` it for a table.

    Attributes:
        rows: one :class:`~sparsekern.analysis.Account` per layer, in the model's order.
        milliseconds: ``{name: (sparse, dense)}`` of forward and backward, if measured.
        dense_flops: ``{name: FLOPs}`` of a training step of the dense layer: of the same shape, or of the given dense
            network.
        network_sparsity: fraction of all weights of the model that is not stored
            (:func:`~sparsekern.analysis.summary.network_sparsity`).
        dense_share: the model's parameters that are in no sparse layer.
    """

    rows: list[Account]
    milliseconds: dict[str, tuple[float, float]] = field(default_factory=dict)
    dense_flops: dict[str, int] = field(default_factory=dict)
    network_sparsity: float = 0.0
    dense_share: DenseShare | None = None

    def __str__(self) -> str:
        head = ["layer", "kind", "out x in", "block", "blocks", "sparsity", "parameters", "MFLOP/step", "dense MFLOP"]
        head += ["values MiB", "index MiB", "gradient MiB", "state MiB", "total MiB", "dense MiB"]
        head += ["ms", "dense ms"] if self.milliseconds else []
        lines = [head]
        for row in self.rows:
            block = f"{row.block[0]}x{row.block[1]}" if row.block else f"dense ({row.note})" if row.note else "dense"
            places = f"{row.blocks}/{row.cells}" if row.block else ""
            lines.append([row.name, row.kind, " x ".join(map(str, row.shape)), block, places, *self._numbers([row])])
        lines.append(["total", "", "", "", "", *self._numbers(self.rows)])
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        text = [
            "  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
            for line in lines
        ]
        text.insert(1, "-" * len(text[0]))
        text.insert(-1, "-" * len(text[0]))
        sparse = [row for row in self.rows if row.block is not None]
        if sparse:
            share = 1 - sum(row.elements for row in sparse) / sum(row.numel for row in sparse)
            network = f"all weights of the network: {self.network_sparsity:.1%} absent"
            text.append(f"sparse layers: {share:.1%} absent; {network}; {self.dense_share}")
        if slower := [name for name, (sparse_ms, dense_ms) in self.milliseconds.items() if sparse_ms >= dense_ms]:
            text.append(f"slower than their dense layers on this sample: {', '.join(slower)}")
        return "\n".join(line.rstrip() for line in text)

    def _numbers(self, rows: list[Account]) -> list[str]:
        """Return the numbers of some layers together."""
        dense = [self.dense_flops[row.name] for row in rows if row.name in self.dense_flops]
        times = [self.milliseconds[row.name] for row in rows if row.name in self.milliseconds]
        cells = [
            f"{1 - sum(row.elements for row in rows) / sum(row.numel for row in rows):.1%}",
            f"{sum(row.parameters for row in rows):,}",
            f"{sum(row.flops for row in rows) / 1e6:.2f}",
            f"{sum(dense) / 1e6:.2f}" if dense else "",
        ]
        cells += [f"{sum(getattr(row, name) for row in rows) / MIB:.2f}" for name in BYTES]
        if self.milliseconds:
            cells += [f"{sum(both[i] for both in times):.2f}" if times else "" for i in (0, 1)]
        return cells


def summary(
    model: nn.Module,
    sample_input: Any = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    measure: bool = True,
    dense: nn.Module | None = None,
) -> Summary:
    """Return the table of a model's sparse layers, linear layers and convolutions.

    Convolutions that :func:`sparsekern.sparsify_` leaves dense show the reason: ``dense (stem)``, ``dense
    (depthwise)``.

    Args:
        model: the model; not changed, nor are its gradients.
        sample_input: a tensor, a tuple of arguments, or a dict of keyword arguments of the model. If given, FLOPs are
            those of this batch (otherwise of one token), and the sparse layers are timed, equal ones once.
        optimizer: optimizer whose present state is counted.
        measure: whether to time the layers, each against a dense layer of its size.
        dense: the dense network that ``model`` was made from, if its layers have other shapes
            (:func:`sparsekern.transforms.transform`), to show its FLOPs.

    Returns:
        A :class:`Summary`.

    Raises:
        ValueError: the model has no such layer, or lacks a layer of ``dense``.
        NotImplementedError: sharded layers would be timed.

    Example:
        >>> model = sk.sparsify_(nn.Sequential(nn.Linear(64, 64)), sparsity=0.75, block_size=16)
        >>> table = sk.summary(model, torch.ones(8, 64), measure=False)
        >>> table.rows[0].blocks, table.rows[0].flops / table.rows[0].dense_flops
        (4, 0.25)
    """
    check_kind("model", model, nn.Module, "a torch.nn.Module")
    check_kind("optimizer", optimizer, (torch.optim.Optimizer, NoneType), "a torch.optim.Optimizer, or None")
    check_kind("dense", dense, (nn.Module, NoneType), "a torch.nn.Module, or None")
    layers: dict[str, nn.Module] = {
        name or "(model)": module
        for name, module in model.named_modules()
        if isinstance(module, BlockSparse) or is_replaceable(module)
    }
    if not layers:
        raise InputError(
            "the model has no sparse layer, linear layer or convolution; there is nothing to summarise",
            parameter="model",
        )
    if measure and sample_input is not None:
        sharded = {name: layer for name, layer in layers.items() if isinstance(layer, BlockSparse)}
        refuse_sharded(sharded, "sharded layers cannot be timed one by one; use measure=False")
    inputs = {} if sample_input is None else layer_inputs(model, layers, sample_input)
    rows = []
    milliseconds = {}
    raced: dict[Any, tuple[float, float]] = {}  # equal layers are raced once
    for name, layer in layers.items():
        tokens = 1 if sample_input is None else inputs[name].tokens if name in inputs else 0
        rows.append(account(name, layer, tokens, optimizer))
        if measure and name in inputs and isinstance(layer, BlockSparse):
            kind = kind_of(layer, inputs[name])
            if kind not in raced:
                raced[kind] = time_layer(layer, inputs[name])
            milliseconds[name] = raced[kind]
    flops = _dense_flops(rows, dense, sample_input)
    return Summary(rows, milliseconds, flops, network_sparsity(model), dense_share(model))


def _dense_flops(rows: list[Account], dense: nn.Module | None, sample_input: Any) -> dict[str, int]:
    """Return the FLOPs of the dense layers; if a layer became several, they are those of its first part."""
    if dense is None:
        return {row.name: row.dense_flops for row in rows}
    if sample_input is None:
        raise InputError(
            "dense is given without a sample_input, which determines the tokens of its layers", parameter="dense"
        )
    found = {}
    for name, layer in profile(dense, sample_input).layers.items():
        row = next((row for row in rows if f"{row.name}.".startswith(f"{name}.")), None)
        if row is None:
            raise InputError(
                f"dense has a layer {name!r} and the model has not: give the network it was made from",
                parameter="dense",
            )
        found[row.name] = 6 * layer.multiply_adds
    return found
