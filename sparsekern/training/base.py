"""The shape that all training methods share."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparsekern.errors import InputError
from sparsekern.nn import BlockSparse, refuse_sharded, sparse_layers
from sparsekern.topology import generator_for, stored_blocks
from sparsekern.topology.arguments import check_kind, check_whole
from sparsekern.training.attachment import Attached
from sparsekern.training.closures import backpropagate, loss_of
from sparsekern.training.distributed import check_agreement, refuse_join
from sparsekern.training.followers import Followers, Move, OnMove
from sparsekern.training.metrics import Books
from sparsekern.training.optimizer_state import unwrapped
from sparsekern.training.passes import parallel_modules
from sparsekern.training.saved_state import check_state_of
from sparsekern.training.schedules import Schedule, whole_stop
from sparsekern.training.scores import block_norms, is_finite, protect_last, warn_of_few_blocks
from sparsekern.training.tied import Units

STATE_VERSION = 2

_log = logging.getLogger("sparsekern")

NEVER = -(2**30)
"""The update at which a block of the first topology was grown."""


class Method(Attached):
    """Moves the blocks of a model's sparse layers while it trains; subclasses say which, in :meth:`choose`.

    Owns no loop and patches nothing. Call :meth:`step` after ``optimizer.step()``::

        sparse = sk.SET(model, optimizer, update_every=100, stop=0.75 * steps)
        for x, y in loader:
            loss_fn(model(x), y).backward()
            optimizer.step(); optimizer.zero_grad(set_to_none=True)
            sparse.step()

    Steps are those that the optimizer made: one that gradient scaling skipped does not count. Layers whose values are
    frozen stay as they are.

    Args:
        model: with at least one sparse layer.
        optimizer: holds their values.
        update_every: optimizer steps between updates.
        start, stop: first step of an update, and the step from which on there is none (None: no end).
        drop_fraction: fraction of a layer's blocks that moves, in [0, 1]; falls to 0 along a cosine by ``stop``. Or a
            function of the step.
        anneal, offset: ``"constant"`` for a fraction that does not fall; steps by which all of this is later.
            :class:`~sparsekern.training.Schedule`.
        grown_state: optimizer state of a moved block: ``"zero"`` or ``"mean_v"``; :class:`Followers`.
        scope: ``"layer"``: every layer keeps its number of blocks. ``"global"``, in methods that score by gradients:
            all layers compete for blocks, and one with free slots (``capacity=``) may gain some.
        keep_connected: never drop the strongest block of a block row or column, so that none becomes empty.
        min_age: updates during which a grown block is not dropped. It starts at zero and would be the weakest: when
            updates follow each other closely, few others move. 0, as in the papers, spares none.
        seed: decides every random choice, together with the layer's name and the step.
        check_ranks: compare seed and places of blocks over the ranks, when the method is built and after each update
            (one number), and raise where they differ. All ranks must build it then.
        process_group: the ranks that share one model. Default: all, where torch.distributed is in use.

    Raises:
        ValueError: a number out of range, no sparse layer, an optimizer that lacks one or cannot follow, or ranks that
            differ.
        TypeError: the optimizer is not a :class:`torch.optim.Optimizer`.
        NotImplementedError: the values are sharded.
    """

    scopes: tuple[str, ...] = ("layer",)
    """What ``scope`` may be."""

    pool: float = 1.0
    """Blocks to store for each one that is to remain: more than 1 in a method that chooses among candidates."""

    moves_fraction = True
    """Whether an update moves a fraction of the blocks of each layer, rounded down."""

    sums_over_ranks = False
    """Whether ranks tell each other more than ``check_ranks`` does."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        update_every: int = 100,
        start: int = 0,
        stop: float | None = None,
        drop_fraction: float | Callable[[int], float] = 0.3,
        anneal: str = "cosine",
        offset: int = 0,
        grown_state: str = "zero",
        scope: str = "layer",
        keep_connected: bool = False,
        min_age: int = 0,
        seed: int = 0,
        check_ranks: bool = True,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        optimizer = unwrapped(optimizer)
        self.layers = sparse_layers(model)
        if not self.layers:
            raise InputError("the model has no sparse layer; call sparsekern.sparsify_ first")
        if scope not in self.scopes:
            known = ", ".join(repr(s) for s in self.scopes)
            raise InputError(f"scope is {scope!r}; for {type(self).__name__} it must be {known}", parameter="scope")
        check_whole("min_age", min_age)
        check_whole("seed", seed)
        if min_age < 0:
            raise InputError(f"min_age is {min_age}; it must be 0 or more updates", parameter="min_age")
        self.schedule = Schedule(update_every, start, whole_stop(stop), drop_fraction, anneal, offset)
        self.followers = Followers(self.layers, optimizer, grown_state)
        self.followers.check()
        self.optimizer = optimizer
        self.scope, self.keep_connected, self.min_age = scope, keep_connected, min_age
        self.seed = seed
        self.steps = 0
        self.updates = 0
        self.seconds = 0.0
        self._seen = 0
        self.books = Books(self.layers, seed)
        self._born = {name: torch.full_like(layer.row, NEVER) for name, layer in self.layers.items() if min_age}
        self.check_ranks, self.process_group = check_ranks, process_group
        self._parallel = parallel_modules(model)
        self._compare_ranks()
        fraction = self.schedule.drop_fraction
        if self.moves_fraction and self.scope == "layer" and not callable(fraction):
            warn_of_few_blocks(self.layers, fraction)
        self._warned_of_optimizer = False
        self.note_values()
        self.attach(self.layers.values())
        self.hook("after", "_count")

    def __repr__(self) -> str:
        schedule = self.schedule
        return (
            f"{type(self).__name__}({len(self.layers)} layers, update_every={schedule.update_every}, "
            f"start={schedule.start}, stop={schedule.stop}, step {self.steps}, {self.updates} updates)"
        )

    def choose(self, name: str, layer: BlockSparse, fraction: float, generator: torch.Generator) -> Move | None:
        """Return which blocks of a layer move where, or None. Must change nothing.

        Args:
            name: the layer's name.
            layer: the layer, after the optimizer's step.
            fraction: of its blocks to move, in [0, 1].
            generator: a CPU generator that depends on the seed, the method, the layer's name and the step.
        """
        raise NotImplementedError

    def choose_all(self, fraction: float) -> dict[str, Move]:
        """Return the moves of all layers by name: those of :meth:`choose`. Layers whose values are frozen stay."""
        moves = {}
        for name, layer in self.layers.items():
            if layer.values.requires_grad:
                generator = generator_for(self.seed, type(self).__name__, name, self.steps)
                move = self.choose(name, layer, fraction, generator)
                if move is not None:
                    moves[name] = move
        return moves

    def fill(self, name: str, move: Move) -> None:
        """Set the values of blocks that have just moved, which are zero; here they stay so."""

    def strength(self, name: str, layer: BlockSparse, parts: Units | None = None) -> Tensor:
        """Return the Frobenius norm ``(Z,)`` of every block, or ``(U,)`` of every unit; infinity where none may go.

        That is free slots, blocks younger than ``min_age``, and what ``keep_connected`` protects.

        Raises:
            ValueError: a value is NaN or infinite, so that blocks have no order.
        """
        parts = Units(layer.topology, None, 0) if parts is None else parts
        scores = block_norms(layer)
        full = stored_blocks(layer.index) == layer.topology.slots
        if not is_finite(scores if full else scores[layer.topology.used()]):
            raise InputError(
                f"values of {name!r} hold NaN or infinity at step {self.steps}, so its blocks have no order of "
                "strength: lower the learning rate, or clip the gradients"
            )
        if self.min_age:
            scores = scores.masked_fill(self.updates - self._born[name] <= self.min_age, torch.inf)
        scores = parts.norms(scores)
        return protect_last(parts.topology, scores) if self.keep_connected else scores

    def step(self) -> bool:
        """Update the topology if it is time to. Call it after ``optimizer.step()``; returns whether blocks moved."""
        self.check_step()
        due = self.schedule.due_since(self._seen, self.steps)
        self._seen = self.steps
        return self.update() if due else False

    def check_step(self) -> None:
        """Notice what would let a training go on without this method; the first line of every :meth:`step`.

        Values that changed while no step was counted were stepped by another optimizer: the log says so, once.

        Raises:
            RuntimeError: it is closed.
            NotImplementedError: the values were sharded after it was built, or ranks run out of batches under ``Join``.
        """
        self.check_open()
        refuse_sharded(self.layers)
        if self.check_ranks or self.sums_over_ranks:
            refuse_join(self._parallel, type(self).__name__, self.process_group)
        steps, versions = self._noted
        self.note_values()
        if self.steps == steps and self._noted[1] != versions and not self._warned_of_optimizer:
            self._warned_of_optimizer = True
            _log.warning(
                "values of sparse layers changed, but the %s that %s was built with made no step since: no block "
                "moves. Build the method with the optimizer that steps",
                type(self.optimizer).__name__,
                type(self).__name__,
            )

    def note_values(self) -> None:
        """Take the values as they are now for known; after somebody else than the optimizer wrote into them."""
        self._noted = self.steps, sum(layer.values._version for layer in self.layers.values())

    def _compare_ranks(self) -> None:
        if self.check_ranks:
            schedule = self.schedule
            facts = {
                "method": type(self).__name__,
                "seed": self.seed,
                "update_every, start and stop": (schedule.update_every, schedule.start, schedule.stop),
            }
            check_agreement(facts, self.layers, self.process_group)

    def update(self) -> bool:
        """Update the topology now, whatever the schedule says; returns whether blocks moved."""
        self.check_open()
        with self.writing():
            began = time.perf_counter()
            fraction = self.schedule.fraction(self.steps)
            self.books.open()
            self.followers.check()  # what blocks are chosen by must be there
            moves = {name: move for name, move in self.choose_all(fraction).items() if move.slots.numel()}
            self.followers.check_moves(moves)  # everything, before the first layer moves
            self.followers.move(moves)
            for name, move in moves.items():
                self.fill(name, move)
                self.books.note(name, move)
                if self.min_age:
                    self._born[name].index_fill_(0, move.slots.long(), self.updates)
            self.updates += 1
            self.settle(moves)
            self.note_values()
            self.seconds += time.perf_counter() - began
        self.followers.tell(moves)
        self._compare_ranks()
        return bool(moves)

    def settle(self, moves: dict[str, Move]) -> None:
        """Adapt what a subclass keeps beside the followers to moves that were made; nothing by default."""

    def see_gradients(self) -> None:
        """Notice gradients that were dropped, before somebody else writes into them; nothing by default."""

    def backward(self, closure: Callable[[], Tensor], *, scaler: torch.amp.GradScaler | None = None) -> Tensor:
        """Compute the loss and its gradients: ``sparse.backward(lambda: loss_fn(model(x), y))``.

        The form that every method has; those that need several passes over a batch require it.

        Args:
            closure: computes the loss ``()`` of one batch.
            scaler: scales the loss before the backward.

        Returns:
            The loss, detached and not scaled.
        """
        self.check_open()
        return backpropagate(loss_of(closure), scaler)

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Let the model compute as the network that is being trained, where a training pass sees more or less of it.

        For most methods that is the model as it is; VR-PGE has candidates beside it.
        """
        yield

    def follow(self, target: Tensor | nn.Module, *, layer: str | None = None, on_move: OnMove = "zero") -> None:
        """Let something else follow the blocks.

        Args:
            target: a tensor ``(Z, ...)`` of the named layer; or a copy of the model (an exponential moving average),
                whose blocks then move, and restart from zero, with the model's.
            layer: the layer's name, for a tensor.
            on_move: what happens to a tensor in the slots that move: ``"zero"``, ``"keep"``, or a function
                ``(tensor, slots)``.

        Raises:
            ValueError: the first axis is not the layer's slots, or the copy has other layers or blocks.
        """
        if isinstance(target, nn.Module):
            self.followers.add_model(target)
            return
        if layer is None:
            raise InputError("layer is missing; a tensor follows the layer that it names", parameter="layer")
        self.followers.add_tensor(layer, target, on_move)

    def metrics(self) -> dict[str, float]:
        """Return plain numbers about the topology; waits for the device.

        ``sparsity/*`` fraction absent; ``churn/*`` fraction of blocks that the last update moved; ``kept/*`` fraction
        of the first topology's places that are still in use; ``itop/*`` fraction of all places that were ever in use
        (in a large grid estimated: :class:`~sparsekern.training.coverage.Coverage`); ``steps``, ``updates``,
        ``update_seconds`` in total.
        """
        counts = {"steps": self.steps, "updates": self.updates, "update_seconds": self.seconds}
        return self.books.metrics() | counts

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, beside the model's and the optimizer's state.

        It has the same names from the beginning on, and each tensor the same shape, so that it is a ``Stateful`` for
        ``torch.distributed.checkpoint``. What varies is in a tuple, which that keeps as it is.
        """
        return {
            "version": STATE_VERSION,
            "method": type(self).__name__,
            "steps": self.steps,
            "seen": self._seen,
            "updates": self.updates,
            "seconds": self.seconds,
            **self.books.state_dict(),
            "born": {name: born.cpu() for name, born in self._born.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken.

        Raises:
            ValueError: the state is of another method, version or model, or damaged.
            TypeError: it is no dictionary.
        """
        self.check_state(state)
        self.steps, self._seen = state["steps"], state["seen"]
        self.updates, self.seconds = state["updates"], state["seconds"]
        self.note_values()
        self.books.load_state_dict(state)
        for name, born in self._born.items():
            born.copy_(state["born"].get(name, torch.tensor(NEVER)))

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise what :meth:`load_state_dict` raises, and load nothing."""
        check_kind("state", state, dict, "what state_dict() returned")
        version = state.get("version")
        if type(version) is not int or version != STATE_VERSION:
            raise InputError(f"the state has version {version}; this code reads {STATE_VERSION}")
        if missing := self.state_dict().keys() - state.keys():
            raise InputError(f"the state lacks {', '.join(sorted(missing))}; it is not one that state_dict() returned")
        if not isinstance(state["method"], str) or state["method"] != type(self).__name__:
            raise InputError(f"the state is of {state['method']}; this is {type(self).__name__}")
        if isinstance(start := state["start"], dict) and start.keys() != self.layers.keys():
            raise InputError(f"the state is of layers {', '.join(start)}; the model has {', '.join(self.layers)}")
        check_state_of(self, state)

    @property
    def settled(self) -> bool:
        """Whether all training passes of a step compute with one network, and not with one drawn for the step."""
        return True

    def _count(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if stepped(optimizer):
            self.steps += 1


def stepped(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer whose step has just ended made it; for hooks."""
    # A fused optimizer is called also when gradient scaling skips the step, and told so by found_inf.
    found_inf = getattr(optimizer, "found_inf", None)
    return (found_inf is None or not bool(found_inf)) and not is_rehearsal(optimizer)


def is_rehearsal(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether a step only lets the optimizer make its state: a rate of 0, and all gradients zero.

    ``torch.distributed.checkpoint.state_dict`` makes such steps, of an optimizer without a state at every save.
    """
    for group in optimizer.param_groups:
        rate = group.get("lr")
        if rate is None or (isinstance(rate, Tensor) and rate.device.type != "cpu") or float(rate) != 0:
            return False
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    return all(p.grad is not None for p in parameters) and not any(bool(p.grad.any()) for p in parameters)
