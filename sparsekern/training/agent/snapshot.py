"""A snapshot of a model: an earlier state, its mean gradient, and the pass over batches that takes both (AGENT)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparsekern.errors import InputError
from sparsekern.kernels.contract import accumulate_dtype
from sparsekern.nn import BlockSparse, plain_name, sparse_layers
from sparsekern.topology import Index, Topology, empty_index, rebuild_
from sparsekern.training.distributed import Ranks
from sparsekern.training.passes import (
    ExtraCost,
    RandomState,
    backpropagate,
    extra_passes,
    loss_of,
    scale_of,
    without_gradients,
)
from sparsekern.training.scores import is_finite

EXCHANGED = 2**18
"""Number of elements that :func:`exchange_` copies at a time, which bounds its scratch memory."""

Follow = Callable[[str, Tensor, Callable[[Tensor, Tensor], None]], None]
"""Registers a tensor ``(Z, ...)`` of a named layer as a follower, with the function that a move calls."""


class Snapshot:
    """The values of a model's parameters at one moment, with the topology of that moment and a mean gradient.

    Holds twice the values (the mean at least in float32) and one index of every sparse layer.

    Args:
        model: the model.
        follow: registers a follower of the blocks; None if no block moves.

    Attributes:
        taken: whether it holds a state.
        parameters: parameters of the model that are not frozen, by name.
        values: their values at the snapshot.
        mean: their mean gradient, on the topology of the snapshot; zeros at first.
        layers: the sparse layers and their names, by the name of their values.

    Raises:
        ValueError: all parameters are frozen.
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
        """The tensors that follow the blocks."""
        return list(self._same.values())

    @torch.no_grad()
    def take(self) -> None:
        """Copy the present state of the model. The mean gradient does not change.

        Raises:
            ValueError: blocks have moved, but no method was given that moves them.
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

    def mean_is_finite(self) -> bool:
        """Return whether the mean gradient is known: not NaN or infinite anywhere; synchronises the device."""
        return all(is_finite(mean) for mean in self.mean.values())

    def allocate(self) -> None:
        """Allocate values and mean, which is zero, without taking the snapshot. A second call does nothing."""
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
        """Return pairs of the snapshot's and the layer's coordinates and index; at 1x1 these share tensors."""
        topology, index = self._places[name]
        pairs = zip((topology.row, topology.col, *index), (layer.row, layer.col, *layer.index), strict=True)
        return list({id(mine): (mine, tensor) for mine, tensor in pairs}.values())

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Exchange the contents of model and snapshot, topology included. No tensor's address changes.

        The backward of a pass must be inside the context.
        """
        with ExitStack() as stack:
            # An autocast around both passes caches the weights that it has cast, and would not cast the exchanged ones.
            stack.callback(torch.clear_autocast_cache)
            torch.clear_autocast_cache()
            for name, parameter in self.parameters.items():
                exchange_(parameter, self.values[name])
                stack.callback(exchange_, parameter, self.values[name])
            for name in sorted(self._moved):
                layer = self.layers[name][1]
                pairs = self._pairs(name, layer)
                stack.callback(layer.accept_index_)  # called after the exchanges back: callbacks run in reverse order
                for mine, tensor in pairs:
                    exchange_(tensor, mine)
                    stack.callback(exchange_, tensor, mine)
                layer.accept_index_()
            yield

    def zero_moved_(self, name: str, tensor: Tensor) -> Tensor:
        """Zero a parameter's tensor in the slots whose blocks moved since the snapshot, in place, and return it."""
        if name in self._moved:
            same = self._same[name]
            tensor.masked_fill_(~same.view(-1, *[1] * (tensor.dim() - 1)), 0)
        return tensor

    def corrected(self) -> float:
        """Return the fraction of blocks that have not moved since the snapshot; 1 without sparse layers."""
        if not self.taken:
            return 0.0
        used = [(self._same[name], layer.topology.used()) for name, (_, layer) in self.layers.items()]
        total = sum(int(u.sum()) for _, u in used)
        return sum(int((same & u).sum()) for same, u in used) / total if total else 1.0

    def bytes(self) -> int:
        """Return the number of bytes of all tensors that it holds."""
        places = [
            t for name, (_, layer) in self.layers.items() if name in self._places for t, _ in self._pairs(name, layer)
        ]
        held = [*self.values.values(), *self.mean.values(), *self._same.values(), *places]
        return sum(t.numel() * t.element_size() for t in held)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, allocated if need be. Tensors are not copied, as in an optimizer's state."""
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
        """Load what :meth:`state_dict` returned.

        Raises:
            ValueError: the state has other parameters.
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
    """Exchange the contents of two tensors of one shape, a few rows at a time."""
    if a.dim() == 0:
        a, b = a.view(1), b.view(1)
    rows = max(1, EXCHANGED * a.shape[0] // max(1, a.numel()))
    for x, y in zip(a.split(rows), b.split(rows), strict=True):
        kept = x.clone()
        x.copy_(y)
        y.copy_(kept)


class Losses(NamedTuple):
    """Mean losses of batches over all ranks, with the present weights and with the snapshot's, and sizes of batches."""

    new: list[float]
    old: list[float]
    sizes: list[float]


def pass_over(
    model: nn.Module,
    snapshot: Snapshot,
    batches: Iterable[Any],
    loss: Callable[[Any], Tensor],
    *,
    scaler: torch.amp.GradScaler | None,
    cost: ExtraCost,
    ranks: Ranks,
) -> Losses:
    """Compute the mean gradient of the present weights over batches, into the snapshot's mean, and return losses.

    Weights, gradients, norm statistics and probes do not change. Both passes over a batch have the same dropout. The
    mean is NaN where the gradients of all batches overflow.

    Args:
        model: in training mode, as in a training step.
        snapshot: an earlier snapshot, with whose weights losses are computed too if it is taken.
        batches: of this rank; each is weighted by its number of rows.
        loss: computes the loss ``()`` of a batch.
        scaler: scales losses; a batch whose gradient overflows does not count.
        cost: counts the FLOPs.
        ranks: that train one model.

    Raises:
        ValueError: there are no batches.
    """
    compare = snapshot.taken
    snapshot.allocate()  # taken only when the pass is over: it may fail
    for mean in snapshot.mean.values():
        mean.zero_()
    noted: list[Tensor] = []  # (size, size * new, size * old) of each batch
    with extra_passes(model), without_gradients(model.parameters()):
        for batch in batches:
            closure = partial(loss, batch)
            randomness = RandomState(model)
            with cost.counted("batch"):
                new = backpropagate(loss_of(closure), scaler)
            size = _rows(batch) if _add_gradients(snapshot, _rows(batch), scaler) else 0
            old = torch.zeros_like(new)
            if compare:
                randomness.restore()
                with snapshot.swapped(), torch.no_grad(), cost.counted("compared batch"):
                    old = loss_of(closure)
            # A batch that overflowed has size 0, and must not make the sums over ranks NaN.
            pair = torch.stack([new, old]).double() * size if size else new.new_zeros(2, dtype=torch.float64)
            noted.append(torch.cat([pair.new_tensor([size]), pair]))
    if not noted:
        raise InputError(
            "batches is empty; give some of the training set, a few dozen batches or more", parameter="batches"
        )
    rows = _over_ranks(torch.stack(noted), ranks)
    total = rows[:, 0].sum()
    for mean in snapshot.mean.values():
        ranks.sum(mean).div_(total.to(mean))
    rows = rows[rows[:, 0] > 0]
    sizes, new_sums, old_sums = rows.unbind(1)
    if not compare:
        return Losses([], [], [])
    return Losses((new_sums / sizes).tolist(), (old_sums / sizes).tolist(), sizes.tolist())


@torch.no_grad()
def _add_gradients(snapshot: Snapshot, size: int, scaler: torch.amp.GradScaler | None) -> bool:
    """Add a batch's gradients to the mean and clear them; return False, and add none, if they overflowed."""
    gradients = {name: p.grad for name, p in snapshot.parameters.items() if p.grad is not None}
    for parameter in snapshot.parameters.values():
        parameter.grad = None
    if scaler is None:
        for name, gradient in gradients.items():
            snapshot.mean[name].add_(gradient, alpha=size)
        return True
    if not all(is_finite(gradient) for gradient in gradients.values()):
        return False
    for name, gradient in gradients.items():
        mean = snapshot.mean[name]
        mean.add_(gradient.to(mean.dtype) * (size / scale_of(scaler, mean.device)))
    return True


def _over_ranks(rows: Tensor, ranks: Ranks) -> Tensor:
    """Sum the rows of each batch over ranks; a rank with fewer batches adds nothing to the last ones."""
    if ranks.count == 1:
        return rows
    most = torch.tensor(rows.shape[0], device=rows.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=ranks.group)
    padded = torch.nn.functional.pad(rows, (0, 0, 0, int(most) - rows.shape[0]))
    return ranks.sum(padded)


def _rows(batch: Any) -> int:
    """Return the number of rows of a batch's first tensor; 1 if it has none."""
    tensor = _first_tensor(batch)
    return 1 if tensor is None or tensor.dim() == 0 else tensor.shape[0]


def _first_tensor(batch: Any) -> Tensor | None:
    if isinstance(batch, Tensor):
        return batch
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    return next((found for part in parts if (found := _first_tensor(part)) is not None), None)
