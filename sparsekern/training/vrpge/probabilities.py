"""The probabilities of all units, and their own optimizer (VR-PGE)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparsekern.errors import InputError
from sparsekern.topology.arguments import check_number
from sparsekern.training.distributed import ranks, sum_over_ranks
from sparsekern.training.vrpge.budget import Budget
from sparsekern.training.vrpge.sampling import score_gradient

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}


class Probabilities:
    """One number ``s`` in [0, 1] a unit, that keeps its budget; all start equal.

    Args:
        budget: of how many units, and what they may cost together.
        device: where they are.
        rate: of their optimizer, at its highest.
        optimizer: ``"adam"`` or ``"sgd"``.
        clip: the largest norm of a gradient; None for any.
        group: of the ranks that train one model.

    Raises:
        ValueError: an unknown optimizer, or a number out of range.
    """

    def __init__(
        self,
        budget: Budget,
        device: torch.device,
        *,
        rate: float,
        optimizer: str,
        clip: float | None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        if not isinstance(optimizer, str) or optimizer not in OPTIMIZERS:
            raise InputError(
                f"probability_optimizer is {optimizer!r}; it must be one of {', '.join(OPTIMIZERS)}",
                parameter="probability_optimizer",
            )
        check_number("probability_rate", rate, "a number above 0")
        if not (math.isfinite(rate) and rate > 0):
            raise InputError(
                f"probability_rate is {rate}; it must be above 0, and finite", parameter="probability_rate"
            )
        if clip is not None:
            check_number("score_clip", clip, "a number above 0, or None for no limit")
        if clip is not None and not clip > 0:
            raise InputError(f"score_clip is {clip}; it must be above 0, or None for no limit", parameter="score_clip")
        self.budget, self.rate, self.clip, self._group = budget, rate, clip, group
        self._value = nn.Parameter(budget.project(torch.full((budget.units,), budget.ratio, device=device)))
        self._optimizer = OPTIMIZERS[optimizer]([self._value], lr=rate)
        self._losses: Tensor | None = None  # (K,), each summed over the batches since the last step

    @property
    def value(self) -> Tensor:
        """Return ``s (units,)``, float32, without a gradient."""
        return self._value.detach()

    def note(self, losses: Tensor) -> None:
        """Add the losses ``(K,)`` of a batch; one that overflowed under some mask says nothing about any."""
        losses = torch.where(losses.isfinite().all(), losses.float(), 0)
        self._losses = losses if self._losses is None else self._losses + losses

    def forget(self) -> None:
        """Let no losses have been noted."""
        self._losses = None

    @torch.no_grad()
    def step(self, masks: Tensor, factor: float) -> None:
        """Step against the scores that the noted losses give, if there are any, then keep the budget.

        Ranks that train together average their losses first, and so stay equal to the bit.

        Args:
            masks: ``(K, units)`` bool, under which the losses came about.
            factor: of the rate.
        """
        if self._losses is None:
            return
        losses = sum_over_ranks(self._losses, self._group) / ranks(self._group)
        self.forget()
        s = self._value
        s.grad = score_gradient(losses.to(s.device), masks, s)
        if self.clip is not None:
            nn.utils.clip_grad_norm_([s], self.clip)
        (group,) = self._optimizer.param_groups
        group["lr"] = self.rate * factor
        self._optimizer.step()
        s.grad = None
        s.copy_(self.budget.project(s))

    @torch.no_grad()
    def restart(self, units: dict[str, Tensor], probability: float) -> None:
        """Give units ``(k,)`` of layers, by name, a probability and a fresh optimizer state, then keep the budget."""
        states = [t for t in self._optimizer.state[self._value].values() if isinstance(t, Tensor) and t.dim() == 1]
        for name, chosen in units.items():
            part = self.budget.part(name)
            self._value[part].index_fill_(0, chosen, probability)
            for state in states:
                state[part].index_fill_(0, chosen, 0)
        self._value.copy_(self.budget.project(self._value))

    def state_dict(self) -> dict[str, Any]:
        """Return the probabilities and the state of their optimizer."""
        return {"value": self.value.clone(), "optimizer": self._moments()}

    def _moments(self) -> dict[str, Any]:
        """Return the state of the optimizer, zeros before its first step."""
        if isinstance(self._optimizer, torch.optim.SGD):
            return {}
        found = self._optimizer.state.get(self._value, {})
        zeros = {
            "step": torch.zeros(()),
            "exp_avg": self.value.clone().zero_(),
            "exp_avg_sq": self.value.clone().zero_(),
        }
        return {key: found.get(key, zero) for key, zero in zeros.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        with torch.no_grad():
            self._value.copy_(state["value"])
        moments = {key: moment.clone() for key, moment in state["optimizer"].items()}
        self._optimizer.state.clear()
        if moments and moments["step"] > 0:
            self._optimizer.state[self._value] = moments
