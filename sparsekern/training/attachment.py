"""What ties a method to the steps of an optimizer and to the layers of a model, and how that ends."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

_log = logging.getLogger("sparsekern")

_owners: weakref.WeakKeyDictionary[Any, weakref.ref[Attached]] = weakref.WeakKeyDictionary()
"""Who acts on a layer or an optimizer now."""


class Attached:
    """Something that acts in the steps of an optimizer, until it is closed or nobody refers to it any more.

    Hooks do not keep it alive. A copy, by ``copy.deepcopy`` or a pickle, is attached to its copy of the optimizer.

    Attributes:
        closed: whether :meth:`close` was called, by a user or for something that was built later in its place.
    """

    optimizer: torch.optim.Optimizer
    closed: bool = False

    def attach(self, places: Iterable[Any]) -> None:
        """Take the place of what acted on these layers or this optimizer before, and close that."""
        self._hooks: list[tuple[str, str]] = []
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
                before.leave()
            _owners[place] = weakref.ref(self)

    def hook(self, when: str, name: str) -> None:
        """Call a method ``(optimizer, args, kwargs)`` of this object at each step of the optimizer.

        Args:
            when: ``"before"`` or ``"after"`` the step.
            name: of the method.
        """
        self._hooks.append((when, name))
        self._register(when, name)

    def _register(self, when: str, name: str) -> None:
        owner = weakref.ref(self)

        def act(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            attached = owner()
            if attached is not None:
                getattr(attached, name)(optimizer, args, kwargs)

        optimizer = self.optimizer
        register = optimizer.register_step_pre_hook if when == "before" else optimizer.register_step_post_hook
        self._handles.append(register(act))

    def leave(self) -> None:
        """Act no more; subclasses add what else ends."""
        self.closed = True
        _remove(self._handles)

    def close(self) -> None:
        """Act no more: the optimizer and the model are as if this had never been built, but for the blocks that moved.

        ``metrics()`` and ``state_dict()`` still answer. Does nothing the second time.
        """
        if not self.closed:
            self.leave()

    def check_open(self) -> None:
        """Raise RuntimeError if this is closed."""
        if self.closed:
            raise RuntimeError(
                f"this {type(self).__name__} is closed, by close() or because another was built later for the same "
                "layers or optimizer; use that one, or build it anew"
            )

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Hold back what writes into the topology, so that another thread can evaluate the model meanwhile.

        An update, and what else exchanges blocks (the passes of AGENT and VR-PGE), waits until every such context ends;
        several may be open at once, and one that is opened while an update waits comes after it, so do not wait in one
        for a thread that is to open another. The optimizer's steps do not wait: values may change while they are read.

        Raises:
            RuntimeError: at an update in the thread that holds it back itself.
        """
        with self._freeze.reading():
            yield

    def writing(self) -> AbstractContextManager[None]:
        """Wait until nobody is in :meth:`frozen`, and hold off who would be, while this writes into the topology."""
        return self._freeze.writing()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_handles", "_freeze")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._handles, self._freeze = [], Freeze()
        if not self.closed:
            self._begin()
            for when, name in self._hooks:
                self._register(when, name)


def _remove(handles: list[Any]) -> None:
    while handles:
        handles.pop().remove()


class Freeze:
    """A lock that many readers hold at once, or one writer, which may write again inside its own writing.

    Readers who come later let a waiting writer go first: a thread that evaluates in a loop would let none in.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._readers: dict[int, int] = {}
        self._writer: int | None = None
        self._waiting = 0  # writers
        self._depth = 0

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Let nobody else write."""
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
        """Let nobody else read or write."""
        me = threading.get_ident()
        with self._changed:
            if self._writer != me:
                if me in self._readers:
                    raise RuntimeError("blocks would move inside frozen() of the same thread; leave the context first")
                self._waiting += 1
                try:
                    self._changed.wait_for(lambda: self._writer is None and not self._readers)
                finally:  # an interrupt may end the waiting
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
