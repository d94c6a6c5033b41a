"""The tensors of an optimizer's state that have one entry a slot, for any optimizer."""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sparsekern.errors import InputError
from sparsekern.kernels.contract import accumulate_dtype
from sparsekern.nn.carry_state import initial_entry
from sparsekern.nn.sharded import is_by_slots, is_sharded, local, own_rows
from sparsekern.training.distributed import sum_of_parts
from sparsekern.training.optimizer_trial import Layout, Refusal, a_what, is_one_value, trial_layout

SECOND_MOMENTS = (
    *("exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "sum", "v"),
    *("row_var", "col_var", "variance", "exp_avg_sq_row", "exp_avg_sq_col"),  # Adafactor, PyTorch's and others
)
"""Names of second moments in the state of optimizers, for ``grown_state="mean_v"``."""


class SlotState(NamedTuple):
    """A state tensor whose first axis is the slots, and the value that its entries begin with."""

    key: str
    tensor: Tensor
    fresh: float


def param_group(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any] | None:
    """Return the parameter group of the optimizer that holds this parameter, or None."""
    for group in optimizer.param_groups:
        if any(p is parameter for p in group["params"]):
            return group
    return None


def slot_state(
    optimizer: torch.optim.Optimizer, parameter: Tensor, name: str, *, part_of: Tensor | None = None
) -> list[SlotState]:
    """Return the state tensors that must be reset where a block moves.

    A state is matched by its axes, not its shape: Adafactor's are ``(Z, bo, 1)``. Numbers and tensors of one element,
    such as step counters, belong to the whole parameter and are left out. The state of PyTorch's own optimizers is
    known; any other optimizer is tried out, once for each size of parameter
    (:func:`~sparsekern.training.optimizer_trial.trial_layout`).

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
    inner = next((key for key, part in vars(optimizer).items() if _holds_optimizer(part)), None)
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
    layout = None if _is_known(optimizer) else _tried(optimizer, group, parameter if part_of is None else part_of, name)
    found = []
    for key, state in optimizer.state.get(parameter, {}).items():
        if not isinstance(state, Tensor) and is_one_value(state):
            continue
        if type(state) not in (Tensor, nn.Parameter) and not _is_spread_alike(state, parameter):
            raise _refused(kind, f"keeps {key!r} for {{}}, {a_what(state)}, which cannot be reset by slots", name)
        if state.dim() == 0 or (layout is not None and key in layout.whole):
            continue
        if layout is not None and key not in layout.fresh:
            raise _refused(
                kind, f"keeps {key!r} for {{}}, which it did not in its first steps: how it begins is unknown", name
            )
        by_slot = layout is not None or _is_by_slot(state, parameter)
        if is_sharded(parameter) and not is_sharded(state):
            raise _refused(kind, f"keeps {key!r} for {{}}, which is not a DTensor as they are", name)
        if not by_slot or state.shape[0] != parameter.shape[0]:
            raise _refused(
                kind,
                f"keeps {key!r} for {{}}, of shape {tuple(state.shape)}, which has no axis of {parameter.shape[0]} "
                "slots: moving blocks would leave it wrong",
                name,
            )
        found.append(
            SlotState(key, state, initial_entry(optimizer, key, group) if layout is None else layout.fresh[key])
        )
    return found


def _is_known(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer is exactly one of PyTorch's own classes."""
    return type(optimizer).__module__.startswith("torch.optim.")


_layouts: WeakKeyDictionary[torch.optim.Optimizer, dict[tuple[Any, ...], Layout | str]] = WeakKeyDictionary()


def _tried(optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: Tensor, name: str) -> Layout:
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
        raise _refused(type(optimizer).__name__, layout, name)
    return layout


def _refused(kind: str, what: str, name: str) -> InputError:
    what = what.replace("{}", f"values of {name!r}")
    return InputError(f"{kind} {what}. Use an optimizer with one state entry a weight, such as SGD or AdamW")


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
