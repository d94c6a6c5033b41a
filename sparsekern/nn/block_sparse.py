"""What all sparse layers share: blocks, their places, and the rules that keep the two together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.utils.parametrize import is_parametrized

from sparsekern.errors import InputError
from sparsekern.nn.converters import CONVERTERS, converter_of
from sparsekern.nn.indexed import Indexed
from sparsekern.nn.init import check_scale, draw_bias, draw_values
from sparsekern.nn.layer_state import LAYER_VERSION, adapt, describe
from sparsekern.nn.sharded import is_sharded, sharded_as, whole
from sparsekern.nn.weight import WeightInfo
from sparsekern.ops import Probe
from sparsekern.topology import (
    Grid,
    Index,
    IndexSource,
    Topology,
    balanced,
    check_tied,
    gather_blocks,
    generator_for,
    one_tap,
    random,
    rebuild_,
    tie,
    to_dense,
    with_capacity,
)
from sparsekern.topology.arguments import check_kind, check_whole

INITS = {"balanced": balanced, "random": random}
"""How an initial topology is drawn, by name."""


class Parametrizations(nn.ModuleDict):
    """Parametrizations of a layer by the names of their tensors, one of which is ``values``.

    PyTorch's own dictionary has a method of that name, and refuses it after the parameter is gone.
    """

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Take a module under any name; modules of a dictionary are asked for by ``[name]``."""
        self._modules[name] = module  # type: ignore[assignment]


def check_given(topology: object, dtype: object) -> None:
    """Check what a layer is given besides sizes.

    Raises:
        TypeError: the topology is none, or values of the dtype cannot train.
    """
    if topology is not None:
        check_kind("topology", topology, Topology, "a sparsekern.topology.Topology, or None to draw one")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype is {dtype!r}; it must be a real floating point type, such as torch.float32")


def is_proxy(input: object) -> bool:
    """Return whether an input stands for one, in :func:`torch.fx.symbolic_trace`."""
    return isinstance(input, Proxy)


class BlockSparse(Indexed):
    """A layer whose weight is ``Z`` slots of one block each.

    Attributes:
        values: Parameter ``(Z, bo, bi)``, the only copy of the weight.
        bias: Parameter ``(out_features,)`` or None; the subclass makes it, then calls :meth:`reset_parameters`.
        row, col: int32 buffers ``(Z,)``, the place of each slot; -1 is a free slot. Saved.
        index: derived from them for the kernels, in buffers that are not saved.
        probe: what a training method asks of the next backward, or None.

    Shapes and addresses never change: a move of blocks writes into these tensors.

    ``row`` and ``col`` change through the layer: :meth:`move_`, loading, :meth:`reset_parameters`. The layer notices,
    before it computes, when other code has put other tensors in their place (it takes them, if they are a topology) or
    has written into them (it raises if that changed anything, and :meth:`refresh_` takes what is there).

    Args:
        grid: cuts the weight into blocks.
        topology: places of the blocks, or None to draw them.
        tie_taps, blocks, capacity, init, init_scale, seed, name, device, dtype: as in :class:`SparseConv2d`.

    Raises:
        ValueError: an unknown ``init``, an ``init_scale`` out of range, or a topology that is not one.
    """

    _version = LAYER_VERSION

    dimensions = 0
    """Axes of the output behind the features, or channels: those of a convolution's images."""

    dense_class: type[nn.Module]
    """Class of the dense layer that this one stands for: what :meth:`to_dense` returns."""

    bias: nn.Parameter | None

    def __init__(
        self,
        grid: Grid,
        topology: Topology | None,
        *,
        tie_taps: bool = False,
        blocks: int,
        capacity: int | None,
        init: str,
        init_scale: float,
        seed: int | None,
        name: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        if topology is None and (not isinstance(init, str) or init not in INITS):
            raise InputError(f"init is {init!r}; it must be one of {', '.join(INITS)}", parameter="init")
        check_scale(init_scale)
        self.grid = grid
        self.tie_taps = tie_taps
        self.init = init if topology is None else "given"
        self.init_scale = init_scale
        # As in torch, construction may read the global generator; afterwards nothing does.
        self.seed = int(torch.randint(2**62, (), device="cpu").item()) if seed is None else seed
        self.name = name
        self.probe: Probe | None = None
        self._lent: Index | None = None  # see lend_index
        self._source: IndexSource | None = None  # None on the meta device
        self._lost = False  # a given topology that went through the meta device
        self._blocks = blocks
        self._capacity = blocks if capacity is None else check_whole("capacity", capacity)
        if topology is None and device is not None and torch.device(device).type == "meta":
            placed = torch.empty(self._capacity, dtype=torch.int32, device="meta")
            topology = Topology(grid, placed, torch.empty_like(placed))
        elif topology is None:
            topology = self._draw()
        else:
            topology = with_capacity(topology, self._capacity)
            self._check(topology)
        values = torch.empty(self._capacity, *grid.block, device=device, dtype=dtype)
        self.values = nn.Parameter(values)
        self.register_buffer("row", topology.row.to(values.device))
        self.register_buffer("col", topology.col.to(values.device))
        self._allocate_index()

    def _draw(self) -> Topology:
        """Draw the initial topology on the CPU: from the seed and the name alone, so ranks agree."""
        if self.init == "given":  # nothing to draw from: all free, until a checkpoint is loaded
            free = torch.full((self._capacity,), -1, dtype=torch.int32, device="cpu")
            return Topology(self.grid, free, free.clone())
        draw, generator = INITS[self.init], generator_for(self.seed, self.name, "topology")
        if self.tie_taps:
            drawn = tie(draw(one_tap(self.grid), self._blocks // self.grid.taps, generator), self.grid)
        else:
            drawn = draw(self.grid, self._blocks, generator)
        return with_capacity(drawn, self._capacity)

    def _draw_again(self) -> Topology:
        """Draw the initial topology into ``row`` and ``col``, which hold nothing of use; returns it on the CPU."""
        topology = self._draw()
        self.row.copy_(topology.row)
        self.col.copy_(topology.col)
        self._lost = self.init == "given"
        return topology

    def _places(self) -> Topology:
        """Return the topology on the CPU, drawn anew into the buffers if they hold none."""
        topology = Topology(self.grid, self.row.cpu(), self.col.cpu())
        try:
            self._check(topology)
        except ValueError:
            topology = self._draw_again()
        if self._lost:
            raise InputError(
                "the layer was built with a given topology, which is lost; load a checkpoint that holds row and col"
            )
        return topology

    @property
    def block_size(self) -> tuple[int, int]:
        """Return ``(bo, bi)``."""
        return self.grid.block

    @property
    def weight(self) -> WeightInfo:
        """Return the shape, dtype and device of the weight; computing with it raises. See :meth:`to_dense`."""
        return WeightInfo(self.grid.weight_shape, self.values)

    @property
    def sparsity(self) -> float:
        """Return the fraction of the weight that is absent (waits for the device)."""
        return self.topology.sparsity()

    def dense_weight(self) -> Tensor:
        """Return the weight as a dense tensor, in the shape of PyTorch's layer, without gradient."""
        return to_dense(self.topology, whole(self.values))

    @staticmethod
    def grid_for(
        arguments: dict[str, Any], block_size: int | tuple[int, int] | None, device: torch.device | str | None
    ) -> Grid:
        """Return the grid of a layer built with ``arguments``; without a block size, that of the device's default."""
        raise NotImplementedError

    def stand_for(self, dense: nn.Module) -> None:
        """Make this the sparse twin of a layer of the class of ``dense``: that is what :meth:`to_dense` returns."""
        if (converter := converter_of(dense)) is not None:
            self.dense_class = converter.dense
            self.grid = replace(self.grid, transposed=converter.transposed)

    @torch.no_grad()
    def copy_dense_(self, dense: nn.Module) -> None:
        """Take the values of the stored blocks, and the bias where both have one, from a layer of the dense class."""
        weight, bias = dense.weight, dense.bias
        assert isinstance(weight, Tensor)
        self.values.copy_(gather_blocks(self.topology, weight))
        if self.bias is not None and isinstance(bias, Tensor):
            self.bias.copy_(bias)

    def dense_forward(self, input: Tensor, weight: Tensor) -> Tensor:
        """Return what PyTorch's layer of these sizes, with this bias, computes with a dense weight."""
        raise NotImplementedError

    def _slow_forward(self, *input: Any, **kwargs: Any) -> Any:
        """Run under ``torch.jit.trace``, which alone calls this: PyTorch's older ONNX exporter gets a dense weight.

        The weight is a constant of the graph: no op that makes it is recorded.
        """
        if not torch.onnx.is_in_onnx_export():
            return super()._slow_forward(*input, **kwargs)
        tracing: Any = torch._C
        state = tracing._get_tracing_state()
        tracing._set_tracing_state(None)
        try:
            weight = to_dense(replace(self.topology, grid=replace(self.grid, transposed=False)), self.values.detach())
        finally:
            tracing._set_tracing_state(state)
        return self.dense_forward(input[0] if input else kwargs["input"], weight)

    def traced(self, input: Any) -> Tensor:
        """Record this layer as one node in the graph of :func:`torch.fx.symbolic_trace`, as PyTorch's layers are.

        Raises:
            TypeError: the layer is all that is traced, which would be a graph that calls itself.
        """
        tracer: Any = input.tracer
        if tracer.root is self:
            raise TypeError("a sparse layer is a node of torch.fx and cannot be traced by itself; trace what holds it")
        node: Tensor = tracer.create_proxy("call_module", tracer.path_of_module(self), (input,), {})
        return node

    def to_dense(self) -> nn.Module:
        """Return the dense layer with the same weight (zeros where no block is) and bias, as copies."""
        dense = CONVERTERS[self.dense_class].dense_layer(self)
        dense.weight = nn.Parameter(self.dense_weight(), requires_grad=self.values.requires_grad)
        if self.bias is not None:
            dense.bias = nn.Parameter(whole(self.bias).clone(), requires_grad=self.bias.requires_grad)
        return dense.train(self.training)

    def reset_parameters(self) -> None:
        """Draw values and bias anew from the seed and the name, for the blocks there are, and rebuild the index.

        Where ``row`` and ``col`` are no topology, as ``to_empty`` leaves them, that is drawn anew too.

        Raises:
            ValueError: there is no topology, and the layer was built with a given one: nothing to draw from.
        """
        if self.row.is_meta:
            return
        topology = self._places()
        with torch.no_grad():
            generator = generator_for(self.seed, self.name, "values")
            drawn = draw_values(topology, self.values.dtype, generator, self.init_scale)
            self.values.copy_(sharded_as(self.values, drawn))
            if self.bias is not None:
                generator = generator_for(self.seed, self.name, "bias")
                drawn = draw_bias(topology, self.bias.dtype, generator, self.init_scale)
                self.bias.copy_(sharded_as(self.bias, drawn))
        self.refresh_()

    def moved(self, slots: Tensor, row: Tensor, col: Tensor) -> Topology:
        """Return the topology as it would be after :meth:`move_`, which raises what this does; nothing changes."""
        self._require_movable()
        topology = self.topology.moved(slots, row, col)
        if self.tie_taps:
            check_tied(topology)
        return topology

    def _require_movable(self) -> IndexSource:
        """Return the source of an index that fits."""
        self.check_not_parametrized()
        if is_sharded(self.values):
            raise NotImplementedError(
                f"values of {self._called} are a DTensor; blocks of sharded values cannot move: use "
                "DistributedDataParallel, or move them before fully_shard"
            )
        _ = self.index
        if self._source is None:
            raise InputError(
                f"{self._called} is on the meta device and has no blocks to move; call to_empty(device=...)"
            )
        return self._source

    @torch.no_grad()
    def move_(self, slots: Tensor, row: Tensor, col: Tensor, *, checked: bool = False) -> None:
        """Move the blocks in ``slots (k,)`` to ``(row, col)``, zero them and their gradient, and rebuild the index.

        In place: no shape or address changes. ``row = col = -1`` frees a slot. Training methods call this through
        their own ``move``, which resets the optimizer's state too. With ``checked`` the caller has called
        ``topology.moved`` with these arguments.

        Raises:
            ValueError: a place is taken or outside the grid, or taps that are tied would part; nothing has changed.
            NotImplementedError: the values are a DTensor; nothing has changed.
        """
        source = self._require_movable()
        if not checked:
            self.moved(slots, row, col)
        slots = slots.long()
        self.row.index_copy_(0, slots, row.to(self.row))
        self.col.index_copy_(0, slots, col.to(self.col))
        self.values.index_fill_(0, slots, 0)
        if self.values.grad is not None:
            self.values.grad.index_fill_(0, slots, 0)
        rebuild_(source.index, self.topology)
        source.accept()

    def check_not_parametrized(self) -> None:
        """Raise ValueError if ``values`` are computed by a parametrization: nothing written into them would stay."""
        if is_parametrized(self, "values"):
            raise InputError(
                f"values of {self._called} are parametrized, so blocks cannot move or load: call "
                "torch.nn.utils.parametrize.remove_parametrizations(layer, 'values') first"
            )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "parametrizations" and type(value) is nn.ModuleDict:  # torch.nn.utils.parametrize begins
            value = Parametrizations(dict(value.items()))
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles are not armed: a probe belongs to the method that reads it."""
        return super().__getstate__() | {"probe": None}

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        was_meta = self.row.is_meta
        super()._apply(fn, recurse)
        if was_meta and not self.row.is_meta:  # to_empty(): the memory is anything, so draw what the seed says
            self._draw_again()
            self.refresh_()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", {})  # not there if the caller gave a plain dict
        if (mine := metadata.get(prefix[:-1])) is not None:
            mine["grid"] = describe(self.grid)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        try:
            self.check_not_parametrized()
            problem = adapt(self.topology, state_dict, prefix, self.tie_taps, local_metadata)
        except ValueError as error:
            problem = str(error)
        if problem is not None:
            error_msgs.append(f"{prefix.rstrip('.') or 'the layer'}: {problem}")
            return
        for name, parameter in self._parameters.items():
            if parameter is not None and isinstance(given := state_dict.get(prefix + name), Tensor):
                state_dict[prefix + name] = sharded_as(parameter, given)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if prefix + "row" not in state_dict or self.row.is_meta:
            return
        self._lost = False
        real = self.topology.real()
        if real is not None and not self.values.is_meta:
            with torch.no_grad():
                self.values.masked_fill_(sharded_as(self.values, ~real), 0)
        self.refresh_()
