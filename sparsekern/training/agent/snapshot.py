"""An earlier state of a model, kept as values, which the model itself can become for a pass (AGENT)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.errors import InputError
from sparsekern.kernels.contract import accumulate_dtype
from sparsekern.nn import BlockSparse, plain_name, sparse_layers
from sparsekern.topology import Index, Topology, empty_index, rebuild_

EXCHANGED = 2**18
"""Elements that :func:`exchange_` copies at a time: what it holds beside the two tensors."""

Follow = Callable[[str, Tensor, Callable[[Tensor, Tensor], None]], None]
"""Registers a tensor ``(Z, ...)`` of a named layer, and what a move of blocks does to it."""


class Snapshot:
    """The values of all parameters that train at one moment, on the topology of that moment, and a mean gradient there.

    Holds twice the values (the mean in float32 at least) and one index of every sparse layer.

    Args:
        model: whose parameters it is.
        follow: registers what follows the blocks; None if none moves.

    Attributes:
        taken: whether it holds a state.
        parameters: of the model, by name, those that train.
        values: theirs at the snapshot.
        mean: a gradient by the values, on the places of the snapshot, zeros at first.
        layers: by the name of their values, those that may have moved blocks since, with the layer's own name.

    Raises:
        ValueError: no parameter trains.
    """

    def __init__(self, model: nn.Module, follow: Follow | None) -> None:
        self.parameters = {plain_name(model, name): p for name, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise InputError("no parameter of the model trains; AGENT corrects gradients")
        self.taken = False
        self.values: dict[str, Tensor] = {}
        self.mean: dict[str, Tensor] = {}
        by_values = {id(layer.values): (name, layer) for name, layer in sparse_layers(model).items()}
        self.layers: dict[str, tuple[str, BlockSparse]] = {
            name: by_values[id(p)] for name, p in self.parameters.items() if id(p) in by_values
        }
        self._places: dict[str, tuple[Topology, Index]] = {}
        self._fixed = follow is None
        self._moved: set[str] = set()
        self._same = {
            name: torch.ones(layer.values.shape[0], dtype=torch.bool, device=layer.values.device)
            for name, (_, layer) in self.layers.items()
        }
        if follow is not None:
            for name, (layer_name, _) in self.layers.items():
                follow(layer_name, self._same[name], partial(self._note, name))

    def _note(self, name: str, same: Tensor, slots: Tensor) -> None:
        same.index_fill_(0, slots.to(same.device), False)
        self._moved.add(name)

    @property
    def followers(self) -> list[Tensor]:
        """Return the tensors that follow the blocks."""
        return list(self._same.values())

    @torch.no_grad()
    def take(self) -> None:
        """Let the present state be the snapshot. The mean stays.

        Raises:
            ValueError: blocks have moved, and nobody said who moves them.
        """
        if self.taken and self._fixed and not all(self._is_here(name) for name in self.layers):
            raise InputError("blocks moved, but AGENT knows of no method; give the one that moves them, method=...")
        self.allocate()
        for name, parameter in self.parameters.items():
            self.values[name].copy_(parameter)
        for name, (_, layer) in self.layers.items():
            for mine, tensor in self._pairs(name, layer):
                mine.copy_(tensor)
            self._same[name].fill_(True)
        self._moved.clear()
        self.taken = True

    def allocate(self) -> None:
        """Make room for values and the mean, which is zero; nothing is taken by that. Does nothing if there is room."""
        if self.values:
            return
        for name, p in self.parameters.items():
            self.values[name] = torch.empty_like(p, requires_grad=False)
            self.mean[name] = torch.zeros_like(p, dtype=accumulate_dtype(p.dtype), requires_grad=False)
        for name, (_, layer) in self.layers.items():
            topology = Topology(layer.grid, layer.row.clone(), layer.col.clone())
            self._places[name] = (topology, empty_index(topology))

    def _is_here(self, name: str) -> bool:
        places, topology = self._places[name][0], self.layers[name][1].topology
        return torch.equal(places.row, topology.row) and torch.equal(places.col, topology.col)

    def _pairs(self, name: str, layer: BlockSparse) -> list[tuple[Tensor, Tensor]]:
        """Return the snapshot's and the layer's tensors of places and index; at 1x1 the index shares the places."""
        topology, index = self._places[name]
        pairs = zip((topology.row, topology.col, *index), (layer.row, layer.col, *layer.index), strict=True)
        return list({id(mine): (mine, tensor) for mine, tensor in pairs}.values())

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Let the model be the snapshot, on the topology of the snapshot. No address changes.

        The backward of a pass must end before this does.
        """
        with ExitStack() as stack:
            # An autocast around both passes keeps the weights that it has cast, and would not cast others.
            stack.callback(torch.clear_autocast_cache)
            torch.clear_autocast_cache()
            for name, parameter in self.parameters.items():
                exchange_(parameter, self.values[name])
                stack.callback(exchange_, parameter, self.values[name])
            for name in sorted(self._moved):
                layer = self.layers[name][1]
                pairs = self._pairs(name, layer)
                stack.callback(layer.accept_index_)  # after the exchanges back: callbacks run last in, first out
                for mine, tensor in pairs:
                    exchange_(tensor, mine)
                    stack.callback(exchange_, tensor, mine)
                layer.accept_index_()
            yield

    def zero_moved_(self, name: str, tensor: Tensor) -> Tensor:
        """Zero a tensor of a parameter, in place, in the slots whose blocks moved since the snapshot; returns it."""
        if name in self._moved:
            same = self._same[name]
            tensor.masked_fill_(~same.view(-1, *[1] * (tensor.dim() - 1)), 0)
        return tensor

    def corrected(self) -> float:
        """Return the fraction of the blocks that are where they were at the snapshot; 1 without sparse layers."""
        if not self.taken:
            return 0.0
        used = [(self._same[name], layer.topology.used()) for name, (_, layer) in self.layers.items()]
        total = sum(int(u.sum()) for _, u in used)
        return sum(int((same & u).sum()) for same, u in used) / total if total else 1.0

    def bytes(self) -> int:
        """Return the bytes that it holds."""
        places = [
            t for name, (_, layer) in self.layers.items() if name in self._places for t, _ in self._pairs(name, layer)
        ]
        held = [*self.values.values(), *self.mean.values(), *self._same.values(), *places]
        return sum(t.numel() * t.element_size() for t in held)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs; not copies, as an optimizer's. Makes room for them if there is none."""
        if not self.values:
            self.allocate()
            for values in self.values.values():
                values.zero_()
        return {
            "taken": self.taken,
            "values": dict(self.values),
            "mean": dict(self.mean),
            "row": {name: topology.row for name, (topology, _) in self._places.items()},
            "col": {name: topology.col for name, (topology, _) in self._places.items()},
            "same": dict(self._same),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken.

        Raises:
            ValueError: the state is of other parameters.
        """
        if not state["taken"]:
            self.taken = False
            return
        shapes = {name: tuple(p.shape) for name, p in self.parameters.items()}
        if {name: tuple(v.shape) for name, v in state["values"].items()} != shapes:
            raise InputError("the state is of other parameters; build model and AGENT as those that were saved")
        self.allocate()
        for mine, saved in ((self.values, state["values"]), (self.mean, state["mean"]), (self._same, state["same"])):
            for name, tensor in mine.items():
                tensor.copy_(saved[name])
        for name, (topology, index) in self._places.items():
            topology.row.copy_(state["row"][name])
            topology.col.copy_(state["col"][name])
            rebuild_(index, topology)
        self._moved = {name for name in self.layers if not self._is_here(name)}
        self._moved |= {name for name, same in self._same.items() if not bool(same.all())}
        self.taken = True


@torch.no_grad()
def exchange_(a: Tensor, b: Tensor) -> None:
    """Exchange what two tensors of one shape hold, a few rows at a time."""
    if a.dim() == 0:
        a, b = a.view(1), b.view(1)
    rows = max(1, EXCHANGED * a.shape[0] // max(1, a.numel()))
    for x, y in zip(a.split(rows), b.split(rows), strict=True):
        kept = x.clone()
        x.copy_(y)
        y.copy_(kept)
