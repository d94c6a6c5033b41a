"""The tie between a method, the steps of its optimizer and the layers of its model: hooks, ownership, freezing."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from sparsekern.nn.sharded import whole

_log = logging.getLogger("sparsekern")

_owners: weakref.WeakKeyDictionary[Any, weakref.ref[Attached]] = weakref.WeakKeyDictionary()
"""The object that currently acts on a layer or an optimizer."""

WRAPPERS = ("AcceleratedOptimizer", "LightningOptimizer", "_FabricOptimizer")
"""Classes of accelerate and Lightning that pass every step on to another optimizer and keep no state themselves."""


class Attached:
    """Base of objects that act at each step of an optimizer until they are closed or garbage collected.

    The optimizer's hooks do not keep the object alive. A copy, by ``copy.deepcopy`` or a pickle, is attached to its
    copy of the optimizer.

    Attributes:
        closed: whether :meth:`close` was called, by the user or because another object took this one's place.
    """

    optimizer: torch.optim.Optimizer
    closed: bool = False

    def attach(self, places: Iterable[Any]) -> None:
        """Register hooks on the optimizer, and detach whatever acted on these layers or optimizers before."""
        self._handles: list[Any] = []
        self._places = list(places)
        self._freeze = Freeze()
        self._begin()

    def _begin(self) -> None:
        weakref.finalize(self, _remove, self._handles).atexit = False
        for place in self._places:
            owner = _owners.get(place)
            before = None if owner is None else owner()
            if before is not None and before is not self and not before.closed:
                _log.info("%s takes the place of the %s built before, which is closed", type(self).__name__, before)
                before.detach()
            _owners[place] = weakref.ref(self)
        me = weakref.ref(self)

        def before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            attached = me()
            if attached is not None and not is_rehearsal(optimizer):
                attached.before_step()

        def after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            attached = me()
            if attached is not None:
                attached.after_step(_was_made(optimizer))

        if type(self).before_step is not Attached.before_step:
            self._handles.append(self.optimizer.register_step_pre_hook(before_step))
        self._handles.append(self.optimizer.register_step_post_hook(after_step))

    def before_step(self) -> None:
        """Called before each step of the optimizer; does nothing by default."""

    def after_step(self, made: bool) -> None:
        """Called after each step of the optimizer; does nothing by default.

        Args:
            made: False for a step that gradient scaling skipped, or that only initialized the optimizer's state.
        """

    def detach(self) -> None:
        """Remove all hooks; subclasses add what else they registered."""
        self.closed = True
        _remove(self._handles)

    def close(self) -> None:
        """Stop acting: remove every hook from the optimizer and the model. Blocks that moved stay where they are.

        ``metrics()`` and ``state_dict()`` still work. A second call does nothing.
        """
        if not self.closed:
            self.detach()

    def check_compact(self) -> None:
        """Raise NotImplementedError if free slots cannot be taken from the layers: this holds numbers for each slot."""
        raise NotImplementedError(
            f"{type(self).__name__} holds numbers for each slot, so slots cannot go; close it first, and build it anew "
            "afterwards"
        )

    def compacted(self, kept: Mapping[Any, Tensor]) -> None:
        """Adapt to layers that kept only the slots ``(n,)``; called after :meth:`check_compact`."""

    def check_open(self) -> None:
        """Raise RuntimeError if this is closed."""
        if self.closed:
            raise RuntimeError(
                f"this {type(self).__name__} is closed, by close() or because another was built later for the same "
                "layers or optimizer; use that one, or build it anew"
            )

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Keep the topology as it is, so that another thread can evaluate the model meanwhile.

        Whatever writes into the topology (an update, the extra passes of AGENT and VR-PGE) waits until all such
        contexts end. Several may be open at once, but one that is opened while an update waits starts after the update:
        inside a context, do not wait for a thread that opens another. Optimizer steps do not wait: values may change
        while they are read.

        Raises:
            RuntimeError: from an update in the same thread.
        """
        with self._freeze.reading():
            yield

    def writing(self) -> AbstractContextManager[None]:
        """Return a context that waits for all :meth:`frozen` contexts to end, and keeps new ones waiting."""
        return self._freeze.writing()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_handles", "_freeze")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._handles, self._freeze = [], Freeze()
        if not self.closed:
            self._begin()


@runtime_checkable
class NetworkSampler(Protocol):
    """A method that trains networks which it samples at each step, until it has chosen one: VR-PGE."""

    finished: bool
    """Whether the choice is made."""

    def evaluation(self) -> AbstractContextManager[None]:
        """Return a context in which the model computes as the network that would be chosen now."""
        ...


def acting_on(places: Iterable[Any]) -> list[Attached]:
    """Return the objects that act on layers or optimizers now, each once."""
    owners = {id(owner): owner for place in places if (known := _owners.get(place)) and (owner := known()) is not None}
    return [owner for owner in owners.values() if not owner.closed]


def _remove(handles: list[Any]) -> None:
    while handles:
        handles.pop().remove()


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer that makes the steps: the argument, or the one inside a wrapper of accelerate or Lightning.

    Raises:
        TypeError: neither a :class:`torch.optim.Optimizer` nor such a wrapper.
    """
    while any(kind.__name__ in WRAPPERS for kind in type(optimizer).__mro__):
        parts = vars(optimizer)
        inner = parts.get("optimizer", parts.get("_optimizer"))
        shared = isinstance(inner, torch.optim.Optimizer) and (
            optimizer.state is inner.state and optimizer.param_groups is inner.param_groups
        )
        if not shared:
            break
        optimizer = inner
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}; it must be a torch.optim.Optimizer")
    return optimizer


def _was_made(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether a step that has just ended changed the parameters."""
    # A fused optimizer is called also when gradient scaling skips the step, and reads found_inf itself.
    found_inf = getattr(optimizer, "found_inf", None)
    return (found_inf is None or not bool(found_inf)) and not is_rehearsal(optimizer)


def is_rehearsal(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether a step only initializes the optimizer's state: learning rate 0, and all gradients zero.

    ``torch.distributed.checkpoint.state_dict`` makes such a step before it saves an optimizer without state.
    """
    for group in optimizer.param_groups:
        rate = group.get("lr")
        if rate is None or (isinstance(rate, Tensor) and rate.device.type != "cpu") or float(rate) != 0:
            return False
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    return all(p.grad is not None for p in parameters) and not any(bool(whole(p.grad.any())) for p in parameters)


class Freeze:
    """A lock that many readers hold at once, or one writer. The writer may write again inside its own writing.

    New readers wait for a waiting writer: otherwise a thread that evaluates in a loop would never let one in.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._readers: dict[int, int] = {}
        self._writer: int | None = None
        self._waiting = 0  # writers
        self._depth = 0

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Exclude writers of other threads."""
        me = threading.get_ident()
        with self._changed:
            inside = me in self._readers or self._writer == me
            self._changed.wait_for(lambda: inside or (self._writer is None and not self._waiting))
            self._readers[me] = self._readers.get(me, 0) + 1
        try:
            yield
        finally:
            with self._changed:
                self._readers[me] -= 1
                if not self._readers[me]:
                    del self._readers[me]
                self._changed.notify_all()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Exclude readers and writers of other threads."""
        me = threading.get_ident()
        with self._changed:
            if self._writer != me:
                if me in self._readers:
                    raise RuntimeError("blocks would move inside frozen() of the same thread; leave the context first")
                self._waiting += 1
                try:
                    self._changed.wait_for(lambda: self._writer is None and not self._readers)
                finally:  # the wait may be interrupted
                    self._waiting -= 1
                    self._changed.notify_all()
                self._writer = me
            self._depth += 1
        try:
            yield
        finally:
            with self._changed:
                self._depth -= 1
                if not self._depth:
                    self._writer = None
                    self._changed.notify_all()
