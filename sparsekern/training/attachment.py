"""The tie between a method, the steps of its optimizer and the layers of its model; checks of what it saved."""

from __future__ import annotations

import logging
import math
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from sparsekern.errors import InputError
from sparsekern.nn.sharded import whole
from sparsekern.topology.arguments import check_kind
from sparsekern.training.passes import backpropagate, loss_of

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
                # A fused optimizer is called also when gradient scaling skips the step, and reads found_inf itself.
                skipped = (inf := getattr(optimizer, "found_inf", None)) is not None and bool(inf)
                attached.after_step(not skipped and not is_rehearsal(optimizer))

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

    @property
    def grad_scale(self) -> Tensor | None:
        """The scale by which a fused optimizer is to divide the gradients of its step; None if they are not scaled."""
        return getattr(self.optimizer, "grad_scale", None)

    def backward(self, closure: Callable[[], Tensor], *, scaler: torch.amp.GradScaler | None = None) -> Tensor:
        """Compute the loss and its gradients: ``sparse.backward(lambda: loss_fn(model(x), y))``.

        All methods have this form; those that compute with a part of the blocks, or in several passes, require it.

        Args:
            closure: computes the loss ``()`` of one batch.
            scaler: scales the loss before the backward.

        Returns:
            The loss, detached and not scaled.
        """
        self.check_open()
        return backpropagate(loss_of(closure), scaler)

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

    def frozen(self) -> AbstractContextManager[None]:
        """Return a context that keeps the topology as it is, so that another thread can evaluate the model meanwhile.

        Whatever writes into the topology (an update, the extra passes of AGENT and VR-PGE) waits until all such
        contexts end. Several may be open at once, but one that is opened while an update waits starts after the update:
        inside a context, do not wait for a thread that opens another. Optimizer steps do not wait: values may change
        while they are read.

        Raises:
            RuntimeError: from an update in the same thread.
        """
        return self._freeze.reading()

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
    """A method that computes with a part of the blocks until it has chosen those that stay: VR-PGE, Top-KAST."""

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


STATE_VERSION = 2
"""Version of the state of a method."""

FREE = ("start",)
"""Entries whose tensors may be of any length: with a global scope the numbers of blocks change."""

OPTIONAL: dict[str, tuple[Any, str]] = {
    "stage": (int, "a whole number"),
    "averaged": (int, "a whole number"),
    "before": (tuple, "a tuple"),
}
"""Entries that may be None, their type otherwise, and its name in words."""

LARGEST = 2**62
"""Bound of counts."""


def check_state_of_method(method: Any, state: Any) -> None:
    """Check a state that a method is to load, completely.

    Raises:
        ValueError: it is damaged, or of another method, version or model.
        TypeError: it is not a dictionary.
    """
    check_kind("state", state, dict, "what state_dict() returned")
    version, kind = state.get("version"), type(method).__name__
    if type(version) is not int or version != STATE_VERSION:
        raise InputError(f"the state has version {version}; this code reads {STATE_VERSION}")
    if missing := method.state_dict().keys() - state.keys():
        raise InputError(f"the state lacks {', '.join(sorted(missing))}; it is not one that state_dict() returned")
    if not isinstance(state["method"], str) or state["method"] != kind:
        raise InputError(f"the state is of {state['method']}; this is {kind}")
    if isinstance(start := state["start"], dict) and start.keys() != method.layers.keys():
        raise InputError(f"the state is of layers {', '.join(start)}; the model has {', '.join(method.layers)}")
    package = __name__.partition(".")[0]
    known: Any = next(kind for kind in type(method).__mro__ if kind.__module__.partition(".")[0] == package)
    own = known.state_dict(method)  # a user's subclass checks its own entries
    check_like({name: state[name] for name in own}, own)


def check_like(saved: Any, own: Any, where: str = "state", *, free: bool = False) -> None:
    """Check that a saved state has the same names, types, shapes and dtypes as the present one.

    Entries that differ between two states of one object are in tuples, whose elements the loader checks, or may be
    None.

    Args:
        saved: the state to be loaded.
        own: the present ``state_dict()``.
        where: the name of the entry in errors.
        free: whether the lengths of tensors may differ.

    Raises:
        ValueError: an entry is missing, of another type, shape or dtype, negative, or not finite.
    """
    if isinstance(own, dict):
        if not isinstance(saved, dict) or saved.keys() != own.keys():
            names = ", ".join(str(name) for name in own) or "no entry"
            raise InputError(f"{where} must be a dictionary of {names}; it is not one that state_dict() returned")
        for name, value in own.items():
            if name in OPTIONAL:
                _check_optional(saved[name], name, f"{where}[{name!r}]")
                continue
            check_like(saved[name], value, f"{where}[{name!r}]", free=free or name in FREE)
    elif isinstance(own, Tensor):
        _check_tensor(saved, own, where, free=free)
    elif isinstance(own, tuple):
        if not isinstance(saved, tuple) or len(saved) != len(own) or list(map(type, saved)) != list(map(type, own)):
            raise InputError(f"{where} must be a tuple of {len(own)}; it is not one that state_dict() returned")
    elif isinstance(own, (bool, str)):
        if type(saved) is not type(own):
            raise InputError(f"{where} is {saved!r}; it must be a {type(own).__name__}")
    elif own is None:
        if saved is not None:
            raise InputError(f"{where} is {saved!r}; it must be None")
    else:
        whole = type(own) is int
        if type(saved) is not int and (whole or type(saved) is not float):
            raise InputError(f"{where} is {saved!r}; it must be a {'whole ' * whole}number")
        if not math.isfinite(saved) or (whole and not 0 <= saved < LARGEST):
            raise InputError(f"{where} is {saved!r}; it must be finite, and 0 or more if it counts something")


def _check_optional(saved: Any, name: str, where: str) -> None:
    kind, what = OPTIONAL[name]
    if saved is not None and (type(saved) is not kind or (kind is int and not 0 <= saved < LARGEST)):
        raise InputError(f"{where} is {saved!r}; it must be {what}, or None")


def _check_tensor(saved: Any, own: Tensor, where: str, *, free: bool) -> None:
    if not isinstance(saved, Tensor) or saved.layout != torch.strided or saved.is_meta or saved.dtype != own.dtype:
        raise InputError(f"{where} must be a tensor of {own.dtype}")
    if saved.dim() != own.dim() or saved.shape[free:] != own.shape[free:]:
        raise InputError(f"{where} has shape {tuple(saved.shape)}; it must have {tuple(own.shape)}")
