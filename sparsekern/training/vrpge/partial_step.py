"""Steps of any optimizer on some slots of a parameter: the others, and their state, stay as they are."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsekern.training.optimizer_state import param_group, slot_state


class _Away(NamedTuple):
    """A parameter whose place in the optimizer a smaller one takes."""

    parameter: Tensor
    stand_in: nn.Parameter
    slots: Tensor
    name: str


class StandIns:
    """Parameters that hold the chosen slots only, during a step of the optimizer.

    :meth:`enter` puts them into the optimizer's groups with copies of values, gradient and state; after the step
    :meth:`leave` copies what they hold back. The model's own parameters keep shape and address, and the optimizer
    computes on the chosen slots alone. Holds, during the step, one more copy of those.

    Optimizers that sum over a whole parameter (LAMB, Adafactor's relative step) see the chosen slots as the parameter.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._away: list[_Away] = []

    @torch.no_grad()
    def enter(self, name: str, parameter: Tensor, slots: Tensor) -> None:
        """Let ``slots (k,)`` alone of a parameter take part in the next step; nothing happens without a gradient.

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
        stand_in = nn.Parameter(parameter[slots])
        stand_in.grad = parameter.grad[slots]
        if parameter in optimizer.state:
            small = {key: tensor[slots] for key, tensor, _ in states}
            optimizer.state[stand_in] = {**optimizer.state[parameter], **small}
        self._replace(parameter, stand_in)
        self._away.append(_Away(parameter, stand_in, slots, name))

    @torch.no_grad()
    def leave(self) -> None:
        """Put the parameters back, with what the step did to the chosen slots. Also after a step that failed."""
        optimizer = self.optimizer
        while self._away:
            parameter, stand_in, slots, name = self._away.pop()
            # of the stand-in: the group still holds it
            fresh = {key: value for key, _, value in slot_state(optimizer, stand_in, name, part_of=parameter)}
            self._replace(stand_in, parameter)
            parameter.index_copy_(0, slots, stand_in)
            after = optimizer.state.pop(stand_in, None)
            if after is None:
                continue
            whole: dict[str, Any] = optimizer.state[parameter]
            for key, value in after.items():
                if key not in fresh:
                    whole[key] = value
                    continue
                if key not in whole:  # the optimizer's first step has made it
                    shape = (parameter.shape[0], *value.shape[1:])
                    whole[key] = torch.full(shape, fresh[key], dtype=value.dtype, device=value.device)
                whole[key].index_copy_(0, slots, value)

    def _replace(self, old: Tensor, new: Tensor) -> None:
        group = param_group(self.optimizer, old)
        assert group is not None  # slot_state has looked
        group["params"] = [new if p is old else p for p in group["params"]]
