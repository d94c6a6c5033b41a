"""A snapshot of a model: an earlier state and its mean gradient (AGENT); extra passes, and what they cost."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sparsekern.errors import InputError
from sparsekern.kernels.contract import accumulate_dtype, is_finite
from sparsekern.nn import BlockSparse, plain_name, sparse_layers
from sparsekern.nn.norm import keep_norm_statistics
from sparsekern.nn.sharded import (
    is_by_slots,
    is_sharded,
    joined,
    local,
    own_rows,
    reshard,
    sharded_as,
    sharded_modules,
    without_sync,
)
from sparsekern.nn.surgery import without_gradients
from sparsekern.topology import Index, Topology, empty_index, rebuild_
from sparsekern.training.distributed import Ranks

EXCHANGED = 2**18
"""Number of elements that :func:`exchange_` copies at a time, which bounds its scratch memory."""


class Snapshot:
    """The values of a model's parameters at one moment, with the topology of that moment and a mean gradient.

    Holds twice the values (the mean at least in float32) and one index of every sparse layer; of sharded parameters the
    part of this rank.

    Args:
        model: the model.
        group: the process group of the ranks that train it; None for all.
        follow: :meth:`Method.follow` of the method that moves the blocks; None if no block moves.

    Attributes:
        ranks: the ranks that train the model.
        taken: whether it holds a state.
        parameters: parameters of the model that are not frozen, by name.
        values: their values at the snapshot, those of this rank.
        mean: their mean gradient, on the topology of the snapshot, of the same shape; zeros at first.
        sharded: whether parameters are sharded, by ``fully_shard``.
        device: of the first parameter.
        layers: the sparse layers and their names, by the name of their values.
        same: ``(Z,)`` bool by that name, the slots whose blocks have not moved since; these follow the blocks.

    Raises:
        ValueError: all parameters are frozen.
        NotImplementedError: some are sharded and others are not, or not by their first axis or over the same ranks.
    """

    def __init__(
        self, model: nn.Module, group: dist.ProcessGroup | None = None, follow: Callable[..., None] | None = None
    ) -> None:
        self.model, self.ranks = model, Ranks(group)
        self._modules = sharded_modules(model)
        reshard(self._modules, sparse_layers(model))
        self.parameters = {plain_name(model, name): p for name, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise InputError("no parameter of the model trains; AGENT corrects gradients")
        self.sharded = bool(self._modules)
        self.device = next(iter(self.parameters.values())).device
        _check_alike(self.parameters)
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
        self.same = {
            name: torch.ones(layer.values.shape[0], dtype=torch.bool, device=layer.values.device)
            for name, (_, layer) in self.layers.items()
        }
        if follow is not None:
            for name, (layer_name, _) in self.layers.items():
                follow(self.same[name], layer=layer_name, on_move=partial(self._note, name))

    def _note(self, name: str, same: Tensor, slots: Tensor) -> None:
        same.index_fill_(0, slots.to(same.device), False)
        self._moved.add(name)

    def reshard(self) -> None:
        """Free gathered copies of parameters, so that the model has those that the optimizer holds."""
        reshard(self._modules, dict(self.layers.values()))

    def like_parameter(self, name: str, part: Tensor) -> Tensor:
        """Return the tensor of a parameter's shape, sharded as that is, of which this rank has a part."""
        parameter = self.parameters[name]
        return joined(part, parameter, parameter.shape[0]) if self.sharded else part

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
            self.values[name].copy_(local(parameter))
        for name, (_, layer) in self.layers.items():
            for mine, tensor in self._pairs(name, layer):
                mine.copy_(tensor)
            self.same[name].fill_(True)
        self._moved.clear()
        self.taken = True

    def allocate(self) -> None:
        """Allocate values and mean, which is zero, without taking the snapshot. A second call does nothing."""
        if self.values:
            return
        for name, parameter in self.parameters.items():
            p = local(parameter)
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
            self.reshard()
            for name, parameter in self.parameters.items():
                exchange_(local(parameter), self.values[name])
                stack.callback(exchange_, local(parameter), self.values[name])
            for name in sorted(self._moved):
                layer = self.layers[name][1]
                pairs = self._pairs(name, layer)
                stack.callback(layer.accept_index_)  # called after the exchanges back: callbacks run in reverse order
                for mine, tensor in pairs:
                    exchange_(tensor, mine)
                    stack.callback(exchange_, tensor, mine)
                layer.accept_index_()
            stack.callback(self.reshard)  # called first
            yield

    @contextmanager
    def extra_passes(self) -> Iterator[None]:
        """Run passes, with their backwards, that leave no trace: gradients are None, and restored at the end.

        Gradients in the context are of this rank alone; under ``fully_shard`` they are its shards of the mean over
        ranks.
        """
        layers = sparse_layers(self.model).values()
        with ExitStack() as stack:
            stack.enter_context(keep_norm_statistics(self.model))
            stack.enter_context(without_sync(self.model))
            for module in self._modules:
                module.reshard()
                module.set_requires_gradient_sync(True, recurse=False)
                stack.callback(module.reshard)
            stack.enter_context(without_probes(layers))
            stack.enter_context(without_gradients(self.model.parameters()))
            yield

    def has_mean(self) -> bool:
        """Return whether the mean gradient is finite on all ranks; synchronises the device."""
        return not self.ranks.any(not all(map(is_finite, self.mean.values())), self.device)

    def zero_moved_(self, name: str, tensor: Tensor) -> Tensor:
        """Zero this rank's part of a parameter's tensor where blocks moved since the snapshot; return it."""
        if name in self._moved:
            same, rows = self.same[name], own_rows(self.parameters[name])
            same = same if rows is None else same[rows]
            tensor.masked_fill_(~same.view(-1, *[1] * (tensor.dim() - 1)), 0)
        return tensor

    def corrected(self) -> float:
        """Return the fraction of blocks that have not moved since the snapshot; 1 without sparse layers."""
        if not self.taken:
            return 0.0
        used = [(self.same[name], layer.topology.used()) for name, (_, layer) in self.layers.items()]
        total = sum(int(u.sum()) for _, u in used)
        return sum(int((same & u).sum()) for same, u in used) / total if total else 1.0

    def bytes(self) -> int:
        """Return the number of bytes of all tensors that it holds, on all ranks together where they are sharded."""
        places = [
            t for name, (_, layer) in self.layers.items() if name in self._places for t, _ in self._pairs(name, layer)
        ]
        values = [self.like_parameter(name, t) for part in (self.values, self.mean) for name, t in part.items()]
        held = [*values, *self.same.values(), *places]
        return sum(t.numel() * t.element_size() for t in held)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, allocated if need be. Tensors are not copied, as in an optimizer's state."""
        if not self.values:
            self.allocate()
            for values in self.values.values():
                values.zero_()
        return {
            "taken": self.taken,
            "values": {name: self.like_parameter(name, values) for name, values in self.values.items()},
            "mean": {name: self.like_parameter(name, mean) for name, mean in self.mean.items()},
            "row": {name: topology.row for name, (topology, _) in self._places.items()},
            "col": {name: topology.col for name, (topology, _) in self._places.items()},
            "same": dict(self.same),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned; tensors that were sharded may be whole, on all ranks.

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
        for mine, saved in ((self.values, state["values"]), (self.mean, state["mean"])):
            for name, tensor in mine.items():
                tensor.copy_(local(sharded_as(self.parameters[name], saved[name])))
        for name, same in self.same.items():
            same.copy_(state["same"][name])
        for name, (topology, index) in self._places.items():
            topology.row.copy_(state["row"][name])
            topology.col.copy_(state["col"][name])
            rebuild_(index, topology)
        self._moved = {name for name in self.layers if not self._is_here(name)}
        self._moved |= {name for name, same in self.same.items() if not bool(same.all())}
        self.taken = True


def _check_alike(parameters: Mapping[str, Tensor]) -> None:
    """Raise NotImplementedError unless all parameters are whole, or all sharded alike by their first axis."""
    meshes = {getattr(p, "device_mesh", None) for p in parameters.values()}
    if len(meshes) > 1 or not all(is_by_slots(p) for p in parameters.values() if is_sharded(p)):
        raise NotImplementedError(
            "parameters are sharded in several ways, and AGENT takes those that fully_shard shards by their first axis,"
            " all on one mesh: leave out shard_placement_fn, ignored_params and tensor-parallel plans"
        )


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


@contextmanager
def without_probes(layers: Iterable[BlockSparse]) -> Iterator[None]:
    """Disable the probes of layers."""
    armed = [(layer, layer.probe) for layer in layers if layer.probe is not None]
    try:
        for layer, _ in armed:
            layer.probe = None
        yield
    finally:
        for layer, probe in armed:
            layer.probe = probe


class ExtraCost:
    """FLOPs and seconds of the passes that a plain training does not make.

    The FLOPs of the first pass of each kind are counted, and those of later ones assumed equal until :meth:`recount`:
    counting slows a pass down. Seconds are wall-clock time of the host.
    """

    def __init__(self) -> None:
        self.flops = 0
        self.seconds = 0.0
        self._of_pass: dict[str, int] = {}

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Add the seconds that the context takes."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - began

    @contextmanager
    def counted(self, kind: str) -> Iterator[None]:
        """Add the FLOPs of one pass of this kind."""
        if kind in self._of_pass:
            yield
        else:
            # A compiled graph cannot be counted, and one with fullgraph=True not even run under the counter.
            with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
                warnings.filterwarnings("ignore", "Using `torch.compile", UserWarning)  # the counter's own hooks
                with FlopCounterMode(display=False) as counter:
                    yield
            self._of_pass[kind] = counter.get_total_flops()
        self.flops += self._of_pass[kind]

    def recount(self) -> None:
        """Count the next pass of every kind again, because topology or batches may have changed."""
        self._of_pass.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the counts; those that have other names in the course of a run are in a tuple."""
        return {"flops": self.flops, "seconds": self.seconds, "of_pass": (dict(self._of_pass),)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned."""
        self.flops, self.seconds, self._of_pass = state["flops"], state["seconds"], dict(state["of_pass"][0])
