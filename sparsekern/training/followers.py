"""Followers: the tensors that move with the blocks, and nothing is reset by any other route; and ``compact_``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from sparsekern.errors import InputError
from sparsekern.kernels.contract import accumulate_dtype
from sparsekern.nn import BlockSparse, refuse_sharded, sparse_layers
from sparsekern.nn.sharded import check_by_slots, fill_slots_, local, own_rows, parallel_modules, sum_of_parts
from sparsekern.topology import Move
from sparsekern.topology.arguments import check_choice, check_kind
from sparsekern.training.attachment import acting_on, unwrapped
from sparsekern.training.optimizer_state import slot_state

OnMove = str | Callable[[Tensor, Tensor], None]
"""``"zero"``, ``"keep"``, or a function ``(tensor, slots)`` that writes into the tensor in place."""

SECOND_MOMENTS = (
    *("exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "sum", "v"),
    *("row_var", "col_var", "variance", "exp_avg_sq_row", "exp_avg_sq_col"),  # Adafactor, PyTorch's and others
)
"""Names of second moments in the state of optimizers, for ``grown_state="mean_v"``."""


class Followers:
    """The tensors whose first axis is the slots of a layer: the optimizer's state, and those that a user registers.

    Args:
        layers: the sparse layers by name.
        optimizer: holds the values of every layer that trains.
        grown_state: ``"zero"``, or ``"mean_v"``: the second moment of a moved block starts at the mean over the other
            blocks of the layer. From zero, Adam's first step of a grown block is about 3.2 times the learning rate.

    Raises:
        ValueError: ``grown_state`` is unknown.
    """

    def __init__(self, layers: dict[str, BlockSparse], optimizer: torch.optim.Optimizer, grown_state: str) -> None:
        check_choice("grown_state", grown_state, ("zero", "mean_v"))
        self.layers = layers
        self.optimizer = optimizer
        self.grown_state = grown_state
        self._tensors: dict[str, list[tuple[Tensor, OnMove]]] = {name: [] for name in layers}
        self._twins: dict[str, list[BlockSparse]] = {name: [] for name in layers}

    def add_tensor(self, layer: str, tensor: Tensor, on_move: OnMove) -> None:
        """Register a tensor ``(Z, ...)`` as a follower of a layer."""
        check_choice("layer", layer, self.layers)
        check_kind("target", tensor, Tensor, "a tensor whose first axis is the layer's slots, or a copy of the model")
        slots = self.layers[layer].values.shape[0]
        if tensor.dim() == 0 or tensor.shape[0] != slots:
            raise InputError(
                f"a follower of {layer!r} has shape {tuple(tensor.shape)}; its first axis must be its {slots} slots"
            )
        if on_move not in ("zero", "keep") and not callable(on_move):
            raise InputError(
                f"on_move is {on_move!r}; it must be 'zero', 'keep' or a function (tensor, slots)", parameter="on_move"
            )
        self._tensors[layer].append((tensor, on_move))

    def remove(self, tensor: Tensor) -> None:
        """Unregister a tensor."""
        for name, followers in self._tensors.items():
            self._tensors[name] = [(t, on_move) for t, on_move in followers if t is not tensor]

    def add_model(self, copy: nn.Module) -> None:
        """Register a copy of the model, such as an exponential moving average: its blocks move with the model's."""
        if isinstance(copy, AveragedModel):
            if copy.use_buffers:
                raise InputError(
                    "AveragedModel(use_buffers=True) averages the coordinates of blocks; use use_buffers=False"
                )
            copy = copy.module
        twins = sparse_layers(copy)
        if twins.keys() != self.layers.keys():
            raise InputError(
                f"the copy has sparse layers {', '.join(twins) or 'none'}; it must have those of the model, "
                f"{', '.join(self.layers)}"
            )
        for name, twin in twins.items():
            layer = self.layers[name]
            if twin is layer:
                raise InputError("the copy is the model itself; follow a deep copy of it")
            if not _same_blocks(twin, layer):
                raise InputError(f"{name!r} has other blocks in the copy; copy the model before the first move")
        for name, twin in twins.items():
            self._twins[name].append(twin)

    def check(self) -> None:
        """Check that the optimizer holds the values of every layer that trains, and that its state can follow.

        Raises:
            ValueError: it does not, or the state cannot.
        """
        for name, layer in self.layers.items():
            layer.check_not_parametrized()
            if layer.values.requires_grad:
                slot_state(self.optimizer, layer.values, name)

    @torch.no_grad()
    def check_moves(self, moves: dict[str, Move]) -> None:
        """Check moves completely, without changing anything, so that :meth:`move` cannot fail.

        Raises:
            ValueError: a move is not legal, the optimizer or its state cannot follow, a copy of the model no longer
                has the model's blocks, or a follower cannot be written in place.
            NotImplementedError: values of a copy are sharded, but not by slots.
        """
        self.check()
        for name, move in moves.items():
            layer = self.layers[name]
            layer.moved(*move)
            for twin in self._twins[name]:
                check_by_slots(twin.values, repr(name))
                if not _same_blocks(twin, layer):
                    raise InputError(
                        f"{name!r} has other blocks in a copy that follows the model; load both from the same "
                        "checkpoint"
                    )
                _ = twin.index  # raises if other code has written into its coordinates
            slots = layer.values.shape[0]
            for what, tensor in self._written(name):
                if tensor.dim() == 0 or tensor.shape[0] != slots:
                    raise InputError(f"{what} of {name!r} has shape {tuple(tensor.shape)}; it had {slots} slots before")
                try:  # writes nothing, but raises whatever a write would raise
                    local(tensor).index_fill_(0, torch.empty(0, dtype=torch.int64, device=tensor.device), 0)
                except Exception as error:
                    why = str(error).splitlines()[0]
                    raise InputError(
                        f"{what} of {name!r} cannot be written in place where blocks move: {why}; keep it an ordinary "
                        "strided tensor"
                    ) from error

    def check_compact(self) -> None:
        """Raise ValueError if a tensor follows the blocks, or a copy of the model has other blocks than the model."""
        for name, layer in self.layers.items():
            if self._tensors[name]:
                raise InputError(
                    f"a tensor follows the blocks of {name!r}, one entry a slot, so slots cannot go; remove it first "
                    "(AGENT's snapshot: close AGENT)"
                )
            for twin in self._twins[name]:
                twin.check_not_parametrized()
                if not _same_blocks(twin, layer):
                    raise InputError(f"{name!r} has other blocks in a copy that follows the model, so slots cannot go")

    def compacted(self, kept: Mapping[BlockSparse, Tensor]) -> None:
        """Keep the same slots in copies of the model as in its layers."""
        for name, twins in self._twins.items():
            for twin in twins if self.layers[name] in kept else ():
                twin.keep_slots_(kept[self.layers[name]].to(twin.row.device))

    def _written(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """Yield a name for, and the tensor of, each tensor that a move writes into.

        All but the coordinates, which a layer keeps writable: an attempt to write would make it compare its index.
        """
        for layer, whose in ((self.layers[name], ""), *((twin, " of a copy") for twin in self._twins[name])):
            yield f"values{whose}", layer.values
            if layer.values.grad is not None:
                yield f"the gradient{whose}", layer.values.grad
        for key, tensor, _ in slot_state(self.optimizer, self.layers[name].values, name):
            yield f"the optimizer's {key!r}", tensor
        for tensor, on_move in self._tensors[name]:
            if on_move == "zero":
                yield "a follower", tensor

    @torch.no_grad()
    def move(self, moves: dict[str, Move]) -> None:
        """Make moves, by the name of the layer, of blocks and followers. Call :meth:`check_moves` before."""
        for name, move in moves.items():
            self._move(name, move)

    def _move(self, name: str, move: Move) -> None:
        layer = self.layers[name]
        states = slot_state(self.optimizer, layer.values, name)
        layer.move_(*move, checked=True)
        slots = move.slots.long()
        for key, tensor, fresh in states:
            if self.grown_state == "mean_v" and key in SECOND_MOMENTS:
                kept = layer.topology.used().index_fill(0, slots, False)
                fill_slots_(tensor, slots, mean_of_kept(tensor, kept, layer.topology.real()))
            else:
                fill_slots_(tensor, slots, fresh)
        for tensor, on_move in self._tensors[name]:
            if on_move == "zero":
                fill_slots_(tensor, slots.to(tensor.device), 0)
        for twin in self._twins[name]:
            twin.move_(*(t.to(twin.row.device) for t in move), checked=True)

    @torch.no_grad()
    def tell(self, moves: dict[str, Move]) -> None:
        """Call the functions that were registered, after all blocks have moved.

        An error in one of them is raised when all have been called: it must not come between two writes.
        """
        failed: Exception | None = None
        for name, move in moves.items():
            for tensor, on_move in self._tensors[name]:
                if callable(on_move):
                    try:
                        on_move(tensor, move.slots.long())
                    except Exception as error:
                        failed = failed or error
        if failed is not None:
            raise failed


def _same_blocks(a: BlockSparse, b: BlockSparse) -> bool:
    """Return whether two layers, possibly on different devices, have the same blocks in the same slots."""
    return a.grid == b.grid and torch.equal(a.row.to(b.row), b.row) and torch.equal(a.col.to(b.col), b.col)


def mean_of_kept(state: Tensor, kept: Tensor, real: Tensor | None) -> Tensor:
    """Return the mean ``()`` of a state over the blocks that stay, without phantom elements.

    Args:
        state: ``(Z, ...)``.
        kept: ``(Z,)`` bool, slots whose blocks stay.
        real: mask of real elements, or None if all are real; ignored unless the state has one entry a weight.
    """
    part, rows = local(state), own_rows(state)
    weight = (kept if rows is None else kept[rows]).view(-1, *[1] * (state.dim() - 1)).expand_as(part)
    if real is not None and state.shape[1:] == real.shape[1:]:
        weight = weight & (real if rows is None else real[rows])
    total = torch.where(weight, part, 0).sum(dtype=accumulate_dtype(state.dtype))  # a sum in float16 would overflow
    count = sum_of_parts(state, weight.sum()).clamp(min=1)
    return (sum_of_parts(state, total) / count).to(state.dtype)


def compact_(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, like: Mapping[str, Tensor] | None = None
) -> int:
    """Give the memory of free slots back: of values, gradients, optimizer state and index, layer by layer.

    The other slots keep their order, and all that is kept its bits, so the next step is the same. Call it between
    ``optimizer.step()`` and the next forward. The ``values`` of a layer with free slots become a new, smaller
    parameter, which takes the place of the old one in the model and in the optimizer. Whatever else holds the old one
    must be made anew: lists of parameters, CUDA graphs, ``DistributedDataParallel``. ``torch.compile`` compiles such a
    layer again. A training method of the layers follows, and copies of the model that follow it, unless it is VR-PGE or
    AGENT, which hold numbers for each slot.

    A run whose slots went resumes in three steps: build model, optimizer and method as in the beginning; call
    ``compact_(model, optimizer, like=saved)``; load the states.

    Args:
        model: changed in place.
        optimizer: holds the values; changed in place. None if there is none yet.
        like: the state dict of ``model`` from a checkpoint, which is to be loaded next: each layer gets as many slots
            as there, and loses the blocks in the others.

    Returns:
        The number of bytes that are free now.

    Raises:
        TypeError: ``model`` is not a :class:`torch.nn.Module`, or ``optimizer`` is not an optimizer.
        ValueError: the optimizer does not hold the values of a layer that trains, or keeps a state that cannot be split
            by slots; another tensor follows the blocks; or ``like`` has more slots than a layer. Nothing has changed.
        NotImplementedError: the model is under DistributedDataParallel or ``fully_shard``, or its method is VR-PGE or
            AGENT. Nothing has changed.

    Example:
        >>> model = sk.sparsify_(nn.Sequential(nn.Linear(64, 64)), sparsity=0.0, block_size=16)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> sparse = sk.Gradual(model, optimizer, final_sparsity=0.75, stop=2, update_every=1)
        >>> sparse.steps = 1
        >>> sparse.update(), model[0].values.shape
        (True, torch.Size([16, 16, 16]))
        >>> sk.compact_(model, optimizer) > 12 * 16 * 16 * 4, model[0].values.shape
        (True, torch.Size([4, 16, 16]))
    """
    layers = sparse_layers(model)
    if parallel_modules(model):
        raise NotImplementedError(
            "model is under DistributedDataParallel, which holds its parameters: call compact_ on the module inside, "
            "then wrap it again"
        )
    kept = {
        name: used_slots(layer) if like is None else _first_slots(model, layer, like) for name, layer in layers.items()
    }
    return keep_slots_(layers, None if optimizer is None else unwrapped(optimizer), kept)


def keep_slots_(
    layers: Mapping[str, BlockSparse], optimizer: torch.optim.Optimizer | None, kept: Mapping[str, Tensor]
) -> int:
    """Keep some slots of layers, as :func:`compact_` does; raises what it raises.

    Args:
        layers: by name.
        optimizer: holds their values, or None.
        kept: by the name of the layer, ``(n,)`` ascending slots.

    Returns:
        The number of bytes that are free now.
    """
    refuse_sharded(layers, "compact_ works before fully_shard only")
    owners = acting_on([*layers.values(), *([] if optimizer is None else [optimizer])])
    for owner in owners:
        owner.check_compact()
        if optimizer is not owner.optimizer:
            raise InputError(
                f"optimizer is not the one of the {type(owner).__name__} that moves the blocks; give that one",
                parameter="optimizer",
            )
    kept = {name: slots for name, slots in kept.items() if slots.shape[0] < layers[name].topology.slots}
    for name in kept:
        layers[name].check_not_parametrized()
        values = layers[name].values
        if optimizer is not None and (values.requires_grad or values in optimizer.state):  # frozen later
            slot_state(optimizer, values, name)  # raises if it cannot be split
    before = _bytes(layers, optimizer)
    for name, slots in kept.items():
        _keep(name, layers[name], optimizer, slots)
    for owner in owners:
        owner.compacted({layers[name]: slots for name, slots in kept.items()})
    return before - _bytes(layers, optimizer)


def used_slots(layer: BlockSparse) -> Tensor:
    """Return the slots that hold a block, or the first slot where none does, because a layer has at least one."""
    used = layer.topology.used().nonzero().squeeze(1)
    return used if used.shape[0] else used.new_zeros(1)


def _first_slots(model: nn.Module, layer: BlockSparse, like: Mapping[str, Tensor]) -> Tensor:
    """Return as many of the first slots of a layer as it has in a state dict of the model."""
    name = next(name for name, module in model.named_modules() if module is layer)
    row = like.get(f"{name}.row" if name else "row")
    slots = layer.topology.slots
    if row is None or not 1 <= row.shape[0] <= slots:
        found = "nothing" if row is None else f"{row.shape[0]} slots"
        raise InputError(
            f"like has {found} for {name!r}, which has {slots}; build the model as it was in the beginning",
            parameter="like",
        )
    return torch.arange(row.shape[0], device=layer.row.device)


def _keep(name: str, layer: BlockSparse, optimizer: torch.optim.Optimizer | None, slots: Tensor) -> None:
    """Keep some slots of a layer, and of its optimizer state."""
    old = layer.values
    layer.keep_slots_(slots)
    if optimizer is None:
        return
    if old in optimizer.state:
        parts = {part.key for part in slot_state(optimizer, old, name)}
        optimizer.state[layer.values] = {
            key: entry.index_select(0, slots) if key in parts else entry
            for key, entry in optimizer.state.pop(old).items()
        }
    for group in optimizer.param_groups:
        group["params"][:] = [layer.values if p is old else p for p in group["params"]]


def _bytes(layers: Mapping[str, BlockSparse], optimizer: torch.optim.Optimizer | None) -> int:
    """Return the bytes of layers: values, gradients, places, index, and optimizer state."""
    held = {}
    for layer in layers.values():
        state = {} if optimizer is None else optimizer.state.get(layer.values, {})
        for tensor in (layer.values, layer.values.grad, layer.row, layer.col, *layer.index, *state.values()):
            if isinstance(tensor, Tensor):
                held[id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(held.values())
