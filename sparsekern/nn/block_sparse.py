"""The base class of the sparse layers: blocks, their places, and the rules that keep the two consistent."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from sparsekern.errors import InputError
from sparsekern.nn.converters import CONVERTERS, converter_for, converter_of, grid_of
from sparsekern.nn.indexed import Indexed
from sparsekern.nn.init import blocks_of, check_init, draw_bias, draw_values, fan_in
from sparsekern.nn.layer_state import LAYER_VERSION, adapt, describe
from sparsekern.nn.sharded import check_by_slots, fill_slots_, sharded_as, whole
from sparsekern.nn.weight import WeightInfo
from sparsekern.ops import Probe
from sparsekern.topology import (
    Grid,
    IndexSource,
    Topology,
    by_norm,
    check_count,
    check_multiple,
    check_tied,
    gather_blocks,
    generator_for,
    rebuild_,
    to_dense,
    with_capacity,
)
from sparsekern.topology.arguments import check_kind, check_whole

Self = TypeVar("Self", bound="BlockSparse")  # typing has its own from Python 3.11 on


class Parametrizations(nn.ModuleDict):
    """Parametrizations of a layer by the name of the tensor; ``values`` may be one.

    :class:`torch.nn.ModuleDict` has a method ``values`` and refuses a module of that name.
    """

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Add a module under any name; it is read as ``self[name]``."""
        self._modules[name] = module  # type: ignore[assignment]


def check_topology_and_dtype(topology: object, dtype: object) -> None:
    """Raise TypeError if ``topology`` is not a topology or None, or ``dtype`` is not floating point or None."""
    if topology is not None:
        check_kind("topology", topology, Topology, "a sparsekern.topology.Topology, or None to draw one")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype is {dtype!r}; it must be a real floating point type, such as torch.float32")


class BlockSparse(Indexed):
    """Base class of layers whose weight is stored as blocks, one in each of ``Z`` slots.

    ``row`` and ``col`` change through the layer's methods: :meth:`move_`, loading, :meth:`reset_parameters`. Before it
    computes, the layer checks whether other code has replaced these tensors (it takes the new ones if they are a valid
    topology) or written into them (it raises if that changed a place; :meth:`refresh_` accepts what is there). Shapes
    and addresses never change: moves write into the same tensors.

    Attributes:
        values: Parameter ``(Z, bo, bi)``, the only copy of the weight.
        bias: Parameter ``(out_features,)``, or None.
        row, col: int32 buffers ``(Z,)``, the place of each slot; -1 is a free slot. Saved.
        index: what kernels read, derived from the places, in buffers that are not saved.
        probe: what a training method requests from the next backward, or None.

    Args:
        grid: the grid of the weight.
        topology: the places of the blocks, or None to draw them.
        bias, sparsity, blocks, capacity, init, init_scale, seed, name, tie_taps, device, dtype: as in
            :class:`SparseConv2d`.

    Raises:
        ValueError: a topology for another weight, or an option out of range.
    """

    _version = LAYER_VERSION

    dimensions = 0
    """Axes of the output after the features: 0 for a linear layer, 1 or 2 for a convolution."""

    dense_class: type[nn.Module]
    """The dense class that :meth:`to_dense` returns."""

    bias: nn.Parameter | None

    def __init__(
        self,
        grid: Grid,
        topology: Topology | None,
        *,
        bias: bool,
        sparsity: float,
        blocks: int | None,
        capacity: int | None,
        init: str,
        init_scale: float,
        seed: int | None,
        name: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        tie_taps: bool = False,
    ) -> None:
        if topology is None:
            blocks = check_count(grid, blocks_of(grid, sparsity, tie_taps) if blocks is None else blocks)
            if tie_taps:
                check_multiple(grid, blocks)
        else:
            blocks = topology.slots
            topology = replace(topology, grid=replace(topology.grid, transposed=False))  # set by set_dense_class
            if topology.grid != grid:
                theirs, own = ((g.weight_shape, g.groups) for g in (topology.grid, grid))
                raise InputError(
                    f"topology is for a weight {theirs[0]} in {theirs[1]} group(s), and the layer has {own[0]} in "
                    f"{own[1]}; give a topology of the layer's own grid",
                    parameter="topology",
                )
        super().__init__()
        check_init("balanced" if topology is not None else init, init_scale)
        self.grid = grid
        self.tie_taps = tie_taps
        self.init = init if topology is None else "given"
        self.init_scale = init_scale
        # As in torch, construction may read the global generator; afterwards nothing does.
        self.seed = int(torch.randint(2**62, (), device="cpu").item()) if seed is None else seed
        self.name = name
        self.probe: Probe | None = None
        self._lent = self.gradient_index = self._source = None
        self._lost = False
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
        self.values = nn.Parameter(torch.empty(self._capacity, *grid.block, device=device, dtype=dtype))
        self.register_buffer("row", topology.row.to(self.values.device))
        self.register_buffer("col", topology.col.to(self.values.device))
        self._allocate_index()
        if bias:
            self.bias = nn.Parameter(torch.empty(grid.out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    @classmethod
    def from_dense(
        cls: type[Self],
        dense: nn.Module,
        *,
        sparsity: float = 0.9,
        block_size: int | tuple[int, int] | None = None,
        blocks: int | None = None,
        capacity: int | None = None,
        topology: Topology | None = None,
        seed: int | None = None,
        name: str = "",
        tie_taps: bool = False,
    ) -> Self:
        """Build a sparse layer from the blocks of largest norm of a dense layer, or from those of ``topology``.

        Values and bias are copied, device and dtype are those of the dense layer. The other arguments are those of the
        class; ``tie_taps`` is for convolutions only.

        Raises:
            TypeError: ``dense`` is not of a class that becomes this one.
            ValueError: as for the class; or the weight holds NaN, and its blocks cannot be ranked.
        """
        converter = converter_for(dense, cls, "dense")
        weight: Any = dense.weight
        weight = weight.detach()
        if topology is None:
            grid = grid_of(dense, block_size)
            if blocks is None:
                blocks = blocks_of(grid, sparsity, tie_taps)
            topology = by_norm(grid, weight, blocks, tie_taps)
        options = converter.arguments(dense) | ({"tie_taps": True} if tie_taps else {})
        options |= {"device": weight.device, "dtype": weight.dtype, "capacity": capacity, "seed": seed, "name": name}
        layer = cls(**options, topology=topology)
        layer.set_dense_class(dense)
        with torch.no_grad():
            layer.values.copy_(gather_blocks(layer.topology, weight))
            if layer.bias is not None and isinstance(dense.bias, Tensor):
                layer.bias.copy_(dense.bias)
        return layer

    @property
    def block_size(self) -> tuple[int, int]:
        """The block size ``(bo, bi)``."""
        return self.grid.block

    @property
    def weight(self) -> WeightInfo:
        """The shape, dtype and device of the weight. Computing with it raises; see :meth:`to_dense`."""
        return WeightInfo(self.grid.weight_shape, self.values)

    @property
    def sparsity(self) -> float:
        """The fraction of the weight that is not stored (synchronises the device)."""
        return self.topology.sparsity()

    def dense_weight(self) -> Tensor:
        """Return the weight as a dense tensor in the shape of PyTorch's layer, detached."""
        return to_dense(self.topology, whole(self.values))

    @staticmethod
    def grid_for(
        arguments: dict[str, Any], block_size: int | tuple[int, int] | None, device: torch.device | str | None
    ) -> Grid:
        """Return the grid of a layer with these constructor arguments; None takes the device's default block size."""
        raise NotImplementedError

    def set_dense_class(self, dense: nn.Module) -> None:
        """Make :meth:`to_dense` return a layer of the class of ``dense``."""
        if (converter := converter_of(dense)) is not None:
            self.dense_class = converter.dense
            self.grid = replace(self.grid, transposed=converter.transposed)

    def dense_forward(self, input: Tensor, weight: Tensor) -> Tensor:
        """Return the output of PyTorch's layer of the same sizes, with a dense ``weight`` and this layer's bias."""
        raise NotImplementedError

    def _slow_forward(self, *input: Any, **kwargs: Any) -> Any:
        """Forward under ``torch.jit.trace``; PyTorch's older ONNX exporter gets a dense weight.

        The weight is a constant of the graph: the ops that build it are not recorded.
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
        """Record this layer as one node in the graph of :func:`torch.fx.symbolic_trace`, as for PyTorch's layers.

        Raises:
            TypeError: the layer itself is the module being traced, so the graph would call itself.
        """
        tracer: Any = input.tracer
        if tracer.root is self:
            raise TypeError("a sparse layer is a node of torch.fx and cannot be traced by itself; trace what holds it")
        node: Tensor = tracer.create_proxy("call_module", tracer.path_of_module(self), (input,), {})
        return node

    def to_dense(self) -> nn.Module:
        """Return a dense layer with copies of the weight, zero where no block is stored, and of the bias."""
        dense = CONVERTERS[self.dense_class].dense_layer(self)
        dense.weight = nn.Parameter(self.dense_weight(), requires_grad=self.values.requires_grad)
        if self.bias is not None:
            dense.bias = nn.Parameter(whole(self.bias).clone(), requires_grad=self.bias.requires_grad)
        return dense.train(self.training)

    def reset_parameters(self) -> None:
        """Draw the values of the present blocks and the bias again from the seed and the name; rebuild the index.

        If ``row`` and ``col`` hold no valid topology, as after ``to_empty``, the topology is drawn again too.

        Raises:
            ValueError: there is no valid topology, and the layer was built with a given one, which cannot be drawn.
        """
        if self.row.is_meta:
            return
        topology = self._places()
        inputs = fan_in(topology)
        with torch.no_grad():
            generator = generator_for(self.seed, self.name, "values")
            drawn = draw_values(topology, inputs, self.values.dtype, generator, self.init_scale)
            self.values.copy_(sharded_as(self.values, drawn))
            if self.bias is not None:
                generator = generator_for(self.seed, self.name, "bias")
                drawn = draw_bias(self.grid, inputs, self.bias.dtype, generator, self.init_scale)
                self.bias.copy_(sharded_as(self.bias, drawn))
        self._settle_places()
        self._build_index()

    def moved(self, slots: Tensor, row: Tensor, col: Tensor) -> Topology:
        """Return the topology that :meth:`move_` would leave, with the same errors; nothing changes."""
        self._require_movable()
        topology = self.topology.moved(slots, row, col)
        if self.tie_taps:
            check_tied(topology)
        return topology

    def _require_movable(self) -> IndexSource:
        """Return the index's source; raise if blocks cannot move."""
        self.check_not_parametrized()
        check_by_slots(self.values, self._called)
        _ = self.index
        if self._source is None:
            raise InputError(
                f"{self._called} is on the meta device and has no blocks to move; call to_empty(device=...)"
            )
        return self._source

    @torch.no_grad()
    def move_(self, slots: Tensor, row: Tensor, col: Tensor, *, checked: bool = False) -> None:
        """Move blocks to other places, in place; zero their values and gradients and rebuild the index.

        No shape or address changes. Training methods call this through their own ``move``, which also resets the
        optimizer's state. Under ``fully_shard`` call it on all ranks, after ``reshard()`` of the module.

        Args:
            slots: ``(k,)`` integers, the slots to move.
            row, col: ``(k,)`` integers, the new places; -1 in both frees a slot.
            checked: the caller has already called :meth:`moved` with these arguments.

        Raises:
            ValueError: a place is taken or outside the grid, or tied taps would differ; nothing has changed.
            NotImplementedError: the values are sharded, but not by slots; nothing has changed.
        """
        source = self._require_movable()
        if not checked:
            self.moved(slots, row, col)
        slots = slots.long()
        self.row.index_copy_(0, slots, row.to(self.row))
        self.col.index_copy_(0, slots, col.to(self.col))
        fill_slots_(self.values, slots, 0)
        if self.values.grad is not None:
            fill_slots_(self.values.grad, slots, 0)
        rebuild_(source.index, self.topology)
        source.accept()

    def check_not_parametrized(self) -> None:
        """Raise ValueError if ``values`` are computed by a parametrization, which would discard what is written."""
        if is_parametrized(self, "values"):
            raise InputError(
                f"values of {self._called} are parametrized, so blocks cannot move or load: call "
                "torch.nn.utils.parametrize.remove_parametrizations(layer, 'values') first"
            )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "parametrizations" and type(value) is nn.ModuleDict:  # set by torch.nn.utils.parametrize
            value = Parametrizations(dict(value.items()))
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the probe out of copies and pickles: it belongs to the method that set it."""
        return super().__getstate__() | {"probe": None}

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        was_meta = self.row.is_meta
        super()._apply(fn, recurse)
        if was_meta and not self.row.is_meta:  # to_empty(): the content is undefined
            self._draw_again()
            self._settle_places()
            self._build_index()
        return self

    def _counts_repr(self) -> str:
        """Return the last part of ``extra_repr``: blocks and sparsity, or the slots on the meta device."""
        if self.row.is_meta:
            return f"slots={self.values.shape[0]}"
        return f"blocks={self.topology.blocks()}/{self.grid.cells}, sparsity={self.sparsity:.4g}"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", {})  # a plain dict from the caller has none
        if (mine := metadata.get(prefix[:-1])) is not None:
            mine["grid"] = describe(self.grid)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        error_msgs: list[str] = rest[-1]
        try:
            self.check_not_parametrized()
            adapt(self.topology, state_dict, prefix, self.tie_taps, local_metadata)
        except InputError as error:
            error_msgs.append(f"{prefix.rstrip('.') or 'the layer'}: {error}")
            return
        for name, parameter in self._parameters.items():
            if parameter is not None and isinstance(given := state_dict.get(prefix + name), Tensor):
                state_dict[prefix + name] = sharded_as(parameter, given)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
        if prefix + "row" not in state_dict or self.row.is_meta:
            return
        self._lost = False
        real = self.topology.real()
        if real is not None and not self.values.is_meta:
            with torch.no_grad():
                self.values.masked_fill_(sharded_as(self.values, ~real), 0)
        self.refresh_()
