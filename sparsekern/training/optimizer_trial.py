"""Trials of optimizers that are not PyTorch's own, to find out which state they keep for a slot."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

LEAST = 2**14
"""Number of elements of a trial parameter, more than those below which optimizers keep another kind of state."""

SMALL = 2**12
"""Number of elements below which a parameter is small: trial parameters are then no larger than it."""

ALIGNED = 256
"""Number of elements of the pieces in which state may be stored; trial parameters are multiples of it if it is one."""

ONE_VALUE = (int, float, bool, str)
"""Types of state that belong to the whole parameter."""


class Refusal(Exception):
    """An optimizer cannot follow moving blocks; the message is a clause that follows the optimizer's name."""


def a_what(part: Any) -> str:
    """Return the name of an object's type with an article."""
    name = type(part).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


class Layout(NamedTuple):
    """The state that an optimizer keeps for a parameter ``(Z, bo, bi)``."""

    fresh: dict[str, float]
    """Names of the state with one part a slot, and the first value of its entries."""
    whole: frozenset[str]
    """Names of the state of all slots together, such as a step counter."""


def trial_layout(optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: Tensor) -> Layout:
    """Find out what state an optimizer keeps for a parameter, by steps of a copy of it on two small parameters.

    These differ only in their number of slots, so that state of slots differs in shape. Their first slot is zero, like
    a moved block, and so is its gradient in the first steps: the state that the optimizer creates there is the first
    value. Then that slot is moved during the training, after which everything must be finite. Parameters, gradients and
    state of the optimizer do not change, nor do PyTorch's random generators.

    Args:
        optimizer: of any class.
        group: the parameter group that holds the parameter.
        parameter: ``(Z, bo, bi)``.

    Raises:
        Refusal: a state has no axis of slots, or its first value is not one number; or the trial failed.
    """
    sizes = _sizes(parameter.shape[0], math.prod(parameter.shape[1:]))
    failed: Exception | None = None
    with _unnoticed(optimizer, parameter.device):
        for new_group, closed in ((True, False), (False, False), (True, True), (False, True)):
            stand_ins = [
                nn.Parameter(torch.zeros(size, *parameter.shape[1:], dtype=parameter.dtype, device=parameter.device))
                for size in sizes
            ]
            options = {k: v for k, v in group.items() if k in optimizer.defaults or not new_group}
            trial = _Trial(optimizer, options, stand_ins, closed)
            try:
                return trial.run()
            except Refusal:
                raise
            except Exception as error:  # a foreign class may raise anything
                failed = failed or error
    why = str(failed).splitlines() or [""]
    raise Refusal(f"cannot be tried on a parameter of its own, which raised {type(failed).__name__}: {why[0]}")


def _sizes(slots: int, elements: int) -> tuple[int, int]:
    """Return two numbers of slots, at least 2, at which an optimizer treats a parameter as at the given one."""
    period = ALIGNED // math.gcd(ALIGNED, elements)
    if slots * elements > LEAST:
        least = max(2, math.ceil(LEAST / elements))
        slots = least + (slots - least) % period
    elif slots * elements < SMALL:
        return (slots, slots - 1) if slots > 2 else (2, 3)
    slots = max(2, slots)
    return slots, slots + period


@contextmanager
def _unnoticed(optimizer: torch.optim.Optimizer, device: torch.device) -> Iterator[None]:
    """Restore random generators and gradients; parameters without a gradient are not stepped."""
    devices = [device] if device.type == "cuda" else []
    kept = [(p, p.grad) for group in optimizer.param_groups for p in group["params"]]
    try:
        for parameter, _ in kept:
            parameter.grad = None
        with (
            torch.random.fork_rng(devices),
            warnings.catch_warnings(),
            torch.enable_grad(),
            torch.compiler.set_stance("force_eager"),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient


class _Entries(dict[str, Any]):
    """The state of one parameter, which records the first value of each entry."""

    def __init__(self, first: dict[str, Any]) -> None:
        super().__init__()
        self._first = first

    def __setitem__(self, key: str, value: Any) -> None:
        _note(self._first, key, value)
        super().__setitem__(key, value)

    def setdefault(self, key: str, default: Any = None) -> Any:
        _note(self._first, key, default)
        return super().setdefault(key, default)

    def update(self, *args: Any, **kwargs: Any) -> None:
        for key, value in dict(*args, **kwargs).items():
            self[key] = value


class _States(defaultdict[Any, Any]):
    """The state of all parameters; ``first`` holds the first value of each entry."""

    def __init__(self) -> None:
        super().__init__(dict)
        self.first: dict[Tensor, dict[str, Any]] = {}

    def __missing__(self, parameter: Any) -> dict[str, Any]:
        entries = _Entries(self.first.setdefault(parameter, {}))
        super().__setitem__(parameter, entries)
        return entries

    def __setitem__(self, parameter: Any, entries: Any) -> None:
        super().__setitem__(parameter, entries)
        self.note()

    def note(self) -> None:
        for parameter, entries in self.items():
            if isinstance(parameter, Tensor):
                for key, value in entries.items():
                    _note(self.first.setdefault(parameter, {}), key, value)


def _note(first: dict[str, Any], key: str, value: Any) -> None:
    if key not in first:
        first[key] = value.detach().clone() if type(value) in (Tensor, nn.Parameter) else value


class _Trial:
    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        options: dict[str, Any],
        stand_ins: list[nn.Parameter],
        closed: bool,
    ) -> None:
        self._stand_ins, self._closed = stand_ins, closed
        self._states = _States()
        given: dict[Any, Any] = optimizer.state
        for owner, part in given.items():
            if not isinstance(owner, Tensor):
                self._states[owner] = _copied(part)
        kind = type(optimizer)
        twin = object.__new__(kind)
        for key, part in vars(optimizer).items():
            if key.startswith("_optimizer_") and key.endswith("_hooks"):
                twin.__dict__[key] = OrderedDict()
            elif key != "step":  # a scheduler's, bound to the original
                twin.__dict__[key] = _copied(part)
        twin.__dict__["state"] = self._states
        twin.__dict__["param_groups"] = [{**{k: _copied(v) for k, v in options.items()}, "params": stand_ins}]
        train = getattr(twin, "train", None)
        if callable(train):  # schedule-free optimizers do not step in evaluation mode
            train()
        step: Callable[..., Any] = kind.step
        # Without the hooks that a user registered for all optimizers.
        self._step: Callable[..., Any] = inspect.unwrap(step, stop=lambda f: not getattr(f, "hooked", False))
        self._twin = twin

    def step(self, draw: Callable[[Tensor], Tensor]) -> None:
        for stand_in in self._stand_ins:
            stand_in.grad = draw(stand_in)
        if self._closed:
            self._step(self._twin, lambda: torch.ones((), device=self._stand_ins[0].device))
        else:
            self._step(self._twin)
        self._states.note()

    def run(self) -> Layout:
        generator = torch.Generator("cpu").manual_seed(0)

        def drawn(like: Tensor) -> Tensor:
            return (torch.randn(like.shape, generator=generator, device="cpu") * 0.1).to(like)

        def drawn_but_for_one(like: Tensor) -> Tensor:
            return drawn(like).index_fill_(0, torch.zeros(1, dtype=torch.int64, device=like.device), 0)

        with torch.no_grad():
            for stand_in in self._stand_ins:
                stand_in.copy_(drawn_but_for_one(stand_in))
        for _ in range(2):
            self.step(drawn_but_for_one)
        for _ in range(2):
            self.step(drawn)
        layout = self.layout()
        with torch.no_grad():
            for stand_in in self._stand_ins:
                stand_in[:1] = 0
                for key, fresh in layout.fresh.items():
                    self._states[stand_in][key][:1] = fresh
        for _ in range(2):
            self.step(drawn)
        if not self.is_finite():
            raise Refusal("makes NaN of a block that moves, whose values are zero and whose state begins anew")
        return layout

    def is_finite(self) -> bool:
        tensors = [*self._stand_ins, *(t for p in self._stand_ins for t in self._states[p].values())]
        return all(bool(t.isfinite().all()) for t in tensors if isinstance(t, Tensor))

    def layout(self) -> Layout:
        one, other = self._stand_ins
        fresh, whole = {}, set()
        for owner, part in self._states.items():
            if not isinstance(owner, Tensor) and not is_one_value(part):
                raise Refusal(f"keeps {owner!r} for all parameters together, which could not follow moving blocks")
        for key, state in self._states[one].items():
            twin: Any = self._states[other].get(key)
            if is_one_value(state) and is_one_value(twin):
                whole.add(key)
                continue
            if type(state) not in (Tensor, nn.Parameter) or type(twin) not in (Tensor, nn.Parameter, type(None)):
                raise Refusal(f"keeps {key!r} for {{}}, {a_what(state)}, which cannot be reset by slots")
            slots, what = one.shape[0], f"keeps {key!r} for {{}}, of shape {tuple(state.shape)}"
            if state.shape[0] != slots:
                raise Refusal(f"{what}, which has no axis of {slots} slots: moving blocks would leave it wrong")
            if twin is None or twin.shape != (other.shape[0], *state.shape[1:]):
                beside = None if twin is None else tuple(twin.shape)
                raise Refusal(
                    f"{what}, and {beside} for {other.shape[0]} slots: not one part for each slot, so that "
                    "moving blocks would leave it wrong"
                )
            first = self._states.first[one][key][0].double()  # of the slot without a gradient
            if not bool((first == first.flatten()[0]).all()):
                raise Refusal(f"keeps {key!r} for {{}}, which begins with no one number: unknown for a moved block")
            fresh[key] = float(first.flatten()[0])
        return Layout(fresh, frozenset(whole))


def is_one_value(part: Any) -> bool:
    """Return whether a state is a plain value, a tensor of one element, or a collection of these."""
    if isinstance(part, (dict, list, tuple)):
        return all(is_one_value(p) for p in (part.values() if isinstance(part, dict) else part))
    return part is None or isinstance(part, ONE_VALUE) or (isinstance(part, Tensor) and part.numel() == 1)


def _copied(part: Any) -> Any:
    """Return a copy of an attribute of an optimizer, which its steps may change; or itself if it cannot be copied."""
    if isinstance(part, Tensor):
        return part.detach().clone()
    with suppress(Exception):
        return copy.copy(part)
    return part
