"""The table of a model's layers: what each stores and computes, and what its dense layer would take."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import NoneType
from typing import Any

import torch
from torch import nn

from sparsekern.analysis.account import Account, account, network_sparsity
from sparsekern.analysis.layer_race import kind_of, layer_inputs
from sparsekern.analysis.measure import time_layer
from sparsekern.analysis.profile import profile
from sparsekern.errors import InputError
from sparsekern.nn import BlockSparse, DenseShare, dense_share, is_replaceable, refuse_sharded
from sparsekern.topology.arguments import check_kind

MIB = 2**20


@dataclass(frozen=True)
class Summary:
    """The accounts of a model's sparse and dense layers; ``print`` it for a table.

    Attributes:
        rows: one :class:`~sparsekern.analysis.Account` per layer, in the model's order.
        milliseconds: ``{name: (sparse, dense)}`` of forward and backward, if measured.
        dense_flops: ``{name: FLOPs}`` of a training step of the dense layer: of the same shape, or of the given dense
            network.
        network_sparsity: fraction of all weights of the model that is not stored
            (:func:`~sparsekern.analysis.account.network_sparsity`).
        dense_share: the model's parameters that are in no sparse layer.
    """

    rows: list[Account]
    milliseconds: dict[str, tuple[float, float]] = field(default_factory=dict)
    dense_flops: dict[str, int] = field(default_factory=dict)
    network_sparsity: float = 0.0
    dense_share: DenseShare | None = None

    def __str__(self) -> str:
        timed = bool(self.milliseconds)
        head = ["layer", "kind", "out x in", "block", "blocks", "sparsity", "parameters", "MFLOP/step", "dense MFLOP"]
        head += ["values MiB", "index MiB", "gradient MiB", "state MiB", "total MiB", "dense MiB"]
        head += ["ms", "dense ms"] if timed else []
        lines = [head] + [self._cells(row, timed) for row in self.rows] + [self._total(timed)]
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

    def _cells(self, row: Account, timed: bool) -> list[str]:
        sparse = row.block is not None
        cells = [
            row.name,
            row.kind,
            " x ".join(map(str, row.shape)),
            f"{row.block[0]}x{row.block[1]}" if row.block else f"dense ({row.note})" if row.note else "dense",
            f"{row.blocks}/{row.cells}" if sparse else "",
            f"{row.sparsity:.1%}",
            f"{row.parameters:,}",
            f"{row.flops / 1e6:.2f}",
            f"{self.dense_flops[row.name] / 1e6:.2f}" if row.name in self.dense_flops else "",
        ]
        sizes = (
            row.values_bytes,
            row.index_bytes,
            row.gradient_bytes,
            row.state_bytes,
            row.total_bytes,
            row.dense_bytes,
        )
        cells += [f"{size / MIB:.2f}" for size in sizes]
        if timed:
            measured = self.milliseconds.get(row.name)
            cells += ["", ""] if measured is None else [f"{ms:.2f}" for ms in measured]
        return cells

    def _total(self, timed: bool) -> list[str]:
        rows = self.rows
        numel = sum(r.numel for r in rows)
        cells = ["total", "", "", "", "", f"{1 - sum(r.elements for r in rows) / numel:.1%}"]
        cells += [f"{sum(r.parameters for r in rows):,}", f"{sum(r.flops for r in rows) / 1e6:.2f}"]
        cells.append(f"{sum(self.dense_flops.values()) / 1e6:.2f}")
        for name in ("values_bytes", "index_bytes", "gradient_bytes", "state_bytes", "total_bytes", "dense_bytes"):
            cells.append(f"{sum(getattr(r, name) for r in rows) / MIB:.2f}")
        if timed:
            cells += [f"{sum(times[i] for times in self.milliseconds.values()):.2f}" for i in (0, 1)]
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
