"""Passes and optimizer steps that are restricted to some of the units (VR-PGE)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsekern.nn import lend_index
from sparsekern.nn.sharded import copy_slots_, full_like_rows, take_slots
from sparsekern.topology import Index, Move, empty_index, mask_index_
from sparsekern.training.optimizer_state import param_group, slot_state
from sparsekern.training.passes import RandomState, backpropagate, keep_norm_statistics, loss_of, without_sync
from sparsekern.training.vrpge.candidates import Budget, Candidates


class MaskedLayers:
    """Layers that compute with the units of one mask at a time: each is lent an index, always in the same tensors.

    Args:
        candidates: by the names of the layers.
        budget: knows which units belong to which layer.
    """

    def __init__(self, candidates: dict[str, Candidates], budget: Budget) -> None:
        self._candidates, self._budget = candidates, budget
        self._lent: dict[str, Index] = {}

    def slots(self, name: str, units: Tensor) -> Tensor:
        """Return the mask ``(Z,)`` of a layer's slots from a mask over all units."""
        return self._candidates[name].slots(units[self._budget.part(name)])

    def lending(self, units: Tensor) -> ExitStack:
        """Return a context in which the layers compute with the units of a mask ``(units,)`` only."""
        stack = ExitStack()
        for name, candidates in self._candidates.items():
            layer = candidates.layer
            lent = self._lent.get(name)
            if lent is None or lent.row_ptr.device != layer.row.device:
                lent = self._lent[name] = empty_index(layer.topology)
            mask_index_(lent, layer.index, self.slots(name, units), layer.block_size)
            stack.enter_context(lend_index(layer, lent))
        return stack

    def leaving(self, name: str, units: Tensor) -> Move:
        """Return the move that frees the slots of a layer that are not in a mask over all units."""
        used = self._candidates[name].layer.topology.used()
        slots = (used & ~self.slots(name, units)).nonzero().squeeze(1)
        nowhere = torch.full_like(slots, -1, dtype=torch.int32)
        return Move(slots, nowhere, nowhere)

    def clear(self) -> None:
        """Free the tensors of the indices."""
        self._lent.clear()


def masked_passes(
    model: nn.Module,
    layers: MaskedLayers,
    masks: Tensor,
    closure: Callable[[], Tensor],
    every: bool,
    scaler: torch.amp.GradScaler | None,
) -> Tensor:
    """Run the closure under each mask, with the same random numbers, and the backward under the first one.

    Args:
        model: its running statistics of norms are updated under the first mask only.
        layers: the model's layers, which compute with the masks.
        masks: ``(K, units)``.
        closure: computes the loss ``()``.
        every: whether to run the backward under every mask, of the loss divided by K.
        scaler: scales the loss before a backward.

    Returns:
        The losses ``(K,)``, detached and not scaled.
    """
    randomness, losses = RandomState(model), []
    # The pass with a graph is the last one: the index that autograd saved must not change before the backward.
    for number in reversed(range(masks.shape[0])):
        randomness.restore()
        extra = number > 0
        with layers.lending(masks[number]), keep_norm_statistics(model) if extra else nullcontext():
            if extra and not every:
                with torch.no_grad():
                    losses.append(loss_of(closure).detach())
                continue
            loss = loss_of(closure)
            part = loss / masks.shape[0] if every else loss
            with without_sync(model) if extra else nullcontext():
                backpropagate(part, scaler)
            losses.append(loss.detach())
    return torch.stack(losses[::-1])


class _Replaced(NamedTuple):
    """A parameter that a smaller one replaces in the optimizer."""

    parameter: Tensor
    chosen: nn.Parameter
    slots: Tensor
    name: str


class PartialStep:
    """A step of any optimizer on some slots of its parameters; values and state of the others do not change.

    :meth:`begin` replaces a parameter in the optimizer by a smaller one that holds the chosen slots, with their
    gradient and state, and after the step :meth:`end` copies the results back. The model's own parameters keep shape
    and address. Holds, during the step, one more copy of the chosen slots.

    Optimizers that reduce over a whole parameter (LAMB, Adafactor's relative step) reduce over the chosen slots only.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._replaced: list[_Replaced] = []

    @torch.no_grad()
    def begin(self, name: str, parameter: Tensor, slots: Tensor) -> None:
        """Restrict the next step to ``slots (k,)`` of a parameter. Does nothing for one without a gradient.

        Args:
            name: the layer's name, for errors.
            parameter: ``values (Z, bo, bi)``.
            slots: int64.

        Raises:
            ValueError: as :func:`slot_state`.
        """
        if parameter.grad is None:
            return
        optimizer = self.optimizer
        states = slot_state(optimizer, parameter, name)
        chosen = nn.Parameter(take_slots(parameter, slots))
        chosen.grad = take_slots(parameter.grad, slots)
        if parameter in optimizer.state:
            small = {key: take_slots(tensor, slots) for key, tensor, _ in states}
            optimizer.state[chosen] = {**optimizer.state[parameter], **small}
        self._replace(parameter, chosen)
        self._replaced.append(_Replaced(parameter, chosen, slots, name))

    @torch.no_grad()
    def end(self) -> None:
        """Put the parameters back with the results of the step, which may have failed."""
        optimizer = self.optimizer
        while self._replaced:
            parameter, chosen, slots, name = self._replaced.pop()
            # of the smaller parameter, which the group still holds
            fresh = {key: value for key, _, value in slot_state(optimizer, chosen, name, part_of=parameter)}
            self._replace(chosen, parameter)
            copy_slots_(parameter, slots, chosen)
            after = optimizer.state.pop(chosen, None)
            if after is None:
                continue
            whole: dict[str, Any] = optimizer.state[parameter]
            for key, value in after.items():
                if key not in fresh:
                    whole[key] = value
                    continue
                if key not in whole:  # created by the optimizer's first step
                    whole[key] = full_like_rows(value, parameter.shape[0], fresh[key])
                copy_slots_(whole[key], slots, value)

    def _replace(self, old: Tensor, new: Tensor) -> None:
        group = param_group(self.optimizer, old)
        assert group is not None  # slot_state has checked this
        group["params"] = [new if p is old else p for p in group["params"]]
