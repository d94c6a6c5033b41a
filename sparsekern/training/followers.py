"""What goes along when blocks move. The only route by which anything is reset."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from sparsekern.errors import InputError
from sparsekern.nn import BlockSparse, refuse_sharded, sparse_layers
from sparsekern.topology import Grid, places_for
from sparsekern.topology.arguments import check_kind
from sparsekern.training.optimizer_state import SECOND_MOMENTS, mean_of_kept, slot_state

OnMove = str | Callable[[Tensor, Tensor], None]
"""``"zero"``, ``"keep"``, or a function ``(tensor, slots)`` that writes into the tensor in place."""

GROWN_STATES = ("zero", "mean_v")


class Move(NamedTuple):
    """The blocks of ``slots (k,)`` go to block row ``row (k,)`` and block column ``col (k,)``."""

    slots: Tensor
    row: Tensor
    col: Tensor


def to_places(slots: Tensor, keys: Tensor, grid: Grid) -> Move:
    """Return the move of ``slots (k,)`` to the cells ``keys (k,)``; key -1 frees the slot."""
    keys = keys.int()
    return Move(slots, *places_for(keys).places_of(keys, grid.cols))


class Followers:
    """Everything that has an axis of slots: the optimizer's state, and what a user registers.

    Args:
        layers: the sparse layers by name.
        optimizer: holds the values of every layer that trains.
        grown_state: ``"zero"``, or ``"mean_v"``: a moved block's second moment starts at the mean of the others of its
            layer. With zero, Adam's first step of a grown block is about 3.2 times the learning rate.

    Raises:
        ValueError: an unknown ``grown_state``.
    """

    def __init__(self, layers: dict[str, BlockSparse], optimizer: torch.optim.Optimizer, grown_state: str) -> None:
        if grown_state not in GROWN_STATES:
            raise InputError(
                f"grown_state is {grown_state!r}; it must be one of {', '.join(GROWN_STATES)}", parameter="grown_state"
            )
        self.layers = layers
        self.optimizer = optimizer
        self.grown_state = grown_state
        self._tensors: dict[str, list[tuple[Tensor, OnMove]]] = {name: [] for name in layers}
        self._twins: dict[str, list[BlockSparse]] = {name: [] for name in layers}

    def add_tensor(self, layer: str, tensor: Tensor, on_move: OnMove) -> None:
        """Let a tensor ``(Z, ...)`` follow the blocks of a layer."""
        if layer not in self.layers:
            raise InputError(f"layer is {layer!r}; it must be one of {', '.join(self.layers)}", parameter="layer")
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
        """Let a tensor follow no more."""
        for name, followers in self._tensors.items():
            self._tensors[name] = [(t, on_move) for t, on_move in followers if t is not tensor]

    def add_model(self, copy: nn.Module) -> None:
        """Let a copy of the model, such as an exponential moving average, move its blocks with the model's."""
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
        """Raise an error if the optimizer misses a layer or keeps a state that cannot follow.

        Raises:
            ValueError: so.
            NotImplementedError: values are sharded.
        """
        refuse_sharded(self.layers)
        for name, layer in self.layers.items():
            layer.check_not_parametrized()
            if layer.values.requires_grad:
                slot_state(self.optimizer, layer.values, name)

    @torch.no_grad()
    def check_moves(self, moves: dict[str, Move]) -> None:
        """Raise whatever :meth:`move` could raise, with nothing changed.

        Raises:
            ValueError: a move is not legal, the optimizer or a state cannot follow, a copy of the model no longer has
                the model's blocks, or a tensor that follows cannot be written in place.
            NotImplementedError: values are sharded.
        """
        self.check()
        for name, move in moves.items():
            layer = self.layers[name]
            layer.moved(*move)
            for twin in self._twins[name]:
                refuse_sharded({name: twin})
                if not _same_blocks(twin, layer):
                    raise InputError(
                        f"{name!r} has other blocks in a copy that follows the model; load both from the same "
                        "checkpoint"
                    )
                _ = twin.index  # raises if other code has written its places
            slots = layer.values.shape[0]
            for what, tensor in self._written(name):
                if tensor.dim() == 0 or tensor.shape[0] != slots:
                    raise InputError(f"{what} of {name!r} has shape {tuple(tensor.shape)}; it had {slots} slots before")
                try:  # nothing is written, but everything that forbids to write speaks
                    tensor.index_fill_(0, torch.empty(0, dtype=torch.int64, device=tensor.device), 0)
                except Exception as error:
                    why = str(error).splitlines()[0]
                    raise InputError(
                        f"{what} of {name!r} cannot be written in place where blocks move: {why}; keep it an ordinary "
                        "strided tensor"
                    ) from error

    def _written(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """Yield what a move of a layer's blocks writes into, and what it is called.

        Without the places: a layer keeps those writable, and an attempt to write would make it compare its index.
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
        """Move blocks of layers, by name, with all that follows them. :meth:`check_moves` comes before."""
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
                tensor[slots] = mean_of_kept(tensor, kept, layer.topology.real())
            else:
                tensor.index_fill_(0, slots, fresh)
        for tensor, on_move in self._tensors[name]:
            if on_move == "zero":
                tensor.index_fill_(0, slots.to(tensor.device), 0)
        for twin in self._twins[name]:
            twin.move_(*(t.to(twin.row.device) for t in move), checked=True)

    @torch.no_grad()
    def tell(self, moves: dict[str, Move]) -> None:
        """Call the functions that were registered, after everything has moved; all of them, then raise the first error.

        A function may raise what it likes, and so must not stand between two writes.
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
    """Return whether two layers, on whatever devices, hold the same places in the same slots."""
    return a.grid == b.grid and torch.equal(a.row.to(b.row), b.row) and torch.equal(a.col.to(b.col), b.col)
