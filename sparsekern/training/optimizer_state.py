"""The tensors of an optimizer's state that have one entry a slot, for any optimizer.

The state of PyTorch's own optimizers is known; any other optimizer is tried on small parameters to find it out.
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sparsekern.errors import InputError
from sparsekern.nn.sharded import is_by_slots, is_sharded
from sparsekern.nn.surgery import initial_entry, param_group, without_gradients

LEAST = 2**14
"""Number of elements of a trial parameter, more than those below which optimizers keep another kind of state."""

SMALL = 2**12
"""Number of elements below which a parameter is small: trial parameters are then no larger than it."""

ALIGNED = 256
"""Number of elements of the pieces in which state may be stored; trial parameters are multiples of it if it is one."""

ONE_VALUE = (int, float, bool, str)
"""Types of state that belong to the whole parameter."""


class SlotState(NamedTuple):
    """A state tensor whose first axis is the slots, and the value that its entries begin with."""

    key: str
    tensor: Tensor
    fresh: float


def slot_state(
    optimizer: torch.optim.Optimizer, parameter: Tensor, name: str, *, part_of: Tensor | None = None
) -> list[SlotState]:
    """Return the state tensors that must be reset where a block moves.

    A state is matched by its axes, not its shape: Adafactor's are ``(Z, bo, 1)``. Numbers and tensors of one element,
    such as step counters, belong to the whole parameter and are left out. Optimizers that are not PyTorch's own are
    tried out, once for each size of parameter (:func:`trial_layout`).

    Args:
        optimizer: any :class:`torch.optim.Optimizer`.
        parameter: ``values (Z, ...)`` of a layer.
        name: the layer's name, for the error.
        part_of: the values of which ``parameter`` holds some slots, if it does.

    Raises:
        ValueError: the parameter is not in the optimizer, or a state cannot be split by slots.
    """
    kind = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):
        raise InputError(
            "LBFGS keeps flat vectors over all parameters, which cannot follow moving blocks; use an optimizer with "
            "one state entry a weight, such as SGD or AdamW"
        )
    known = type(optimizer).__module__.startswith("torch.optim.")
    inner = None if known else next((key for key, part in vars(optimizer).items() if _holds_optimizer(part)), None)
    if inner is not None:
        raise InputError(
            f"{kind} keeps its state in another optimizer ({inner!r}), where it would not follow moving blocks; use a "
            "plain optimizer"
        )
    group = param_group(optimizer, parameter)
    if group is None:
        raise InputError(
            f"values of {name!r} are not in this optimizer. Build it after sparsify_ (and fully_shard), from "
            "model.parameters(); a model whose sparse layers are spread over several optimizers is not supported"
        )
    try:
        layout = None if known else _tried(optimizer, group, parameter if part_of is None else part_of)
        return [
            SlotState(key, state, initial_entry(optimizer, key, group) if layout is None else layout.fresh[key])
            for key, state in optimizer.state.get(parameter, {}).items()
            if _has_slots(key, state, parameter, layout)
        ]
    except Refusal as refusal:
        what = str(refusal).replace("{}", f"values of {name!r}")
        raise InputError(
            f"{kind} {what}. Use an optimizer with one state entry a weight, such as SGD or AdamW"
        ) from None


class Refusal(Exception):
    """An optimizer cannot follow moving blocks; the message follows its name, and ``{}`` are the values."""


def _has_slots(key: str, state: Any, parameter: Tensor, layout: Layout | None) -> bool:
    """Return whether a state has one part a slot, rather than one for all; raise :class:`Refusal` for any other."""
    if not isinstance(state, Tensor) and is_one_value(state):
        return False
    if type(state) not in (Tensor, nn.Parameter) and not _is_spread_alike(state, parameter):
        raise _not_a_tensor(key, state)
    if state.dim() == 0 or (layout is not None and key in layout.whole):
        return False
    if layout is not None and key not in layout.fresh:
        raise Refusal(f"keeps {key!r} for {{}}, which it did not in its first steps: how it begins is unknown")
    if is_sharded(parameter) and not is_sharded(state):
        raise Refusal(f"keeps {key!r} for {{}}, which is not a DTensor as they are")
    if state.shape[0] != parameter.shape[0] or (layout is None and not _is_by_slot(state, parameter)):
        raise _without_slots(key, state, parameter.shape[0])
    return True


def _not_a_tensor(key: str, state: Any) -> Refusal:
    name = type(state).__name__
    article = "an" if name[0] in "AEIOUaeiou" else "a"
    return Refusal(f"keeps {key!r} for {{}}, {article} {name}, which cannot be reset by slots")


def _without_slots(key: str, state: Tensor, slots: int) -> Refusal:
    return Refusal(
        f"keeps {key!r} for {{}}, of shape {tuple(state.shape)}, which has no axis of {slots} slots: moving blocks "
        "would leave it wrong"
    )


_layouts: WeakKeyDictionary[torch.optim.Optimizer, dict[tuple[Any, ...], Layout | str]] = WeakKeyDictionary()


def _tried(optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: Tensor) -> Layout:
    """Return the layout of an optimizer's state for a parameter, from a trial now or an earlier one."""
    layouts = _layouts.setdefault(optimizer, {})
    key = (parameter.shape, parameter.dtype, parameter.device, id(group))
    if key not in layouts:
        try:
            layouts[key] = trial_layout(optimizer, group, parameter)
        except Refusal as refusal:
            layouts[key] = str(refusal)
    layout = layouts[key]
    if isinstance(layout, str):
        raise Refusal(layout)
    return layout


def _holds_optimizer(part: Any) -> bool:
    """Return whether an attribute of an optimizer is another optimizer, or a collection that holds one."""
    parts = part.values() if isinstance(part, dict) else part if isinstance(part, (list, tuple)) else (part,)
    return any(isinstance(p, torch.optim.Optimizer) for p in parts)


def _is_spread_alike(state: Any, parameter: Any) -> bool:
    """Return whether a state is a DTensor on the ranks of its parameter, by slots or replicated, as in Adafactor."""
    return (
        is_sharded(state)
        and is_sharded(parameter)
        and state.device_mesh == parameter.device_mesh
        and is_by_slots(state)
    )


def _is_by_slot(state: Tensor, parameter: Tensor) -> bool:
    """Return whether a state is one number a slot, or has the parameter's shape with some axes reduced to 1."""
    if state.shape[0] != parameter.shape[0]:
        return False
    later = zip(state.shape[1:], parameter.shape[1:], strict=False)
    return state.dim() == 1 or (state.dim() == parameter.dim() and all(s in (1, p) for s, p in later))


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
    with (
        without_gradients(p for group in optimizer.param_groups for p in group["params"]),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        warnings.catch_warnings(),
        torch.enable_grad(),
        torch.compiler.set_stance("force_eager"),
    ):
        warnings.simplefilter("ignore")
        yield


class _Entries(dict[str, Any]):
    """The state of one parameter, which records the first value of each entry."""

    def __init__(self, first: dict[str, Any]) -> None:
        super().__init__()
        self._first = first

    def __setitem__(self, key: str, value: Any) -> None:
        _note(self._first, key, value)
        super().__setitem__(key, value)

    setdefault: Any = MutableMapping.setdefault  # these two set items one by one
    update: Any = MutableMapping.update


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
        after = [*self._stand_ins, *(t for p in self._stand_ins for t in self._states[p].values())]
        if not all(bool(t.isfinite().all()) for t in after if isinstance(t, Tensor)):
            raise Refusal("makes NaN of a block that moves, whose values are zero and whose state begins anew")
        return layout

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
                raise _not_a_tensor(key, state)
            if state.shape[0] != one.shape[0]:
                raise _without_slots(key, state, one.shape[0])
            if twin is None or twin.shape != (other.shape[0], *state.shape[1:]):
                beside = None if twin is None else tuple(twin.shape)
                raise Refusal(
                    f"keeps {key!r} for {{}}, of shape {tuple(state.shape)}, and {beside} for {other.shape[0]} slots: "
                    "not one part for each slot, so that moving blocks would leave it wrong"
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
