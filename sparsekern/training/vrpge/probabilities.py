"""The probabilities of all units, their optimizer, and the Bernoulli masks drawn by them (VR-PGE)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.errors import InputError
from sparsekern.topology.arguments import check_number
from sparsekern.training.vrpge.candidates import Budget

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}

CHUNK = 2**16
"""Number of units that are processed at a time: temporaries are many times as large as a probability."""


class Probabilities:
    """A probability ``s`` in [0, 1] for each unit, within a budget. All are equal at first.

    Args:
        budget: of the units.
        device: of the probabilities.
        rate: the highest learning rate of their optimizer.
        optimizer: ``"adam"`` or ``"sgd"``.
        clip: the largest norm of their gradient; None for no limit.
        mean_over_ranks: averages a tensor over the ranks that train one model.

    Raises:
        ValueError: the optimizer is unknown, or a number is out of range.
    """

    def __init__(
        self,
        budget: Budget,
        device: torch.device,
        *,
        rate: float,
        optimizer: str,
        clip: float | None,
        mean_over_ranks: Callable[[Tensor], Tensor],
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
        self.budget, self.rate, self.clip, self._mean = budget, rate, clip, mean_over_ranks
        self._value = nn.Parameter(budget.project(torch.full((budget.units,), budget.ratio, device=device)))
        self._optimizer = OPTIMIZERS[optimizer]([self._value], lr=rate)
        self._losses: Tensor | None = None  # (K,), each summed over the batches since the last step

    @property
    def value(self) -> Tensor:
        """The probabilities ``(units,)``, float32, detached."""
        return self._value.detach()

    def add_losses(self, losses: Tensor) -> None:
        """Accumulate the losses ``(K,)`` of a batch; ignore a batch with a loss that is not finite."""
        losses = torch.where(losses.isfinite().all(), losses.float(), 0)
        self._losses = losses if self._losses is None else self._losses + losses

    def clear_losses(self) -> None:
        """Clear the accumulated losses."""
        self._losses = None

    @torch.no_grad()
    def step(self, masks: Tensor, factor: float) -> None:
        """Make an optimizer step from the accumulated losses, if there are any, and project onto the budget.

        Losses are averaged over ranks first, so that probabilities stay equal to the bit.

        Args:
            masks: ``(K, units)`` bool, the masks that gave the losses.
            factor: multiplies the learning rate.
        """
        if self._losses is None:
            return
        losses = self._mean(self._losses)
        self.clear_losses()
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
        """Reset the probability and optimizer state of units ``(k,)``, by layer name, and project onto the budget."""
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
        """Return the state of the optimizer; zeros before its first step."""
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
        """Load what :meth:`state_dict` returned."""
        with torch.no_grad():
            self._value.copy_(state["value"])
        moments = {key: moment.clone() for key, moment in state["optimizer"].items()}
        self._optimizer.state.clear()
        if moments and moments["step"] > 0:
            self._optimizer.state[self._value] = moments


def draw_masks(probabilities: Tensor, masks: int, generator: torch.Generator) -> Tensor:
    """Draw masks ``(masks, U)`` bool, true with probabilities ``(U,)``. The generator is on the CPU."""
    drawn = torch.empty(masks, probabilities.shape[0], dtype=torch.bool, device="cpu")
    likely = probabilities.cpu().split(CHUNK)
    for mask in drawn:
        for part, below in zip(mask.split(CHUNK), likely, strict=True):
            chance = torch.rand(part.shape[0], dtype=torch.float32, generator=generator, device="cpu")
            torch.lt(chance, below, out=part)  # rand() is in [0, 1): a probability of 0 is never drawn, one of 1 always
    return drawn.to(probabilities.device)


def score_gradient(losses: Tensor, masks: Tensor, probabilities: Tensor) -> Tensor:
    """Estimate the gradient of the expected loss by the probabilities, from forward passes alone.

    With K masks ``m_j``, their losses ``L_j`` on one batch, and the mean L of the losses::

        g = 1 / (K - 1) * sum_j (L_j - L) * (m_j - s) / sqrt(s * (1 - s))

    Its expectation is ``sqrt(s * (1 - s))`` times the gradient for any K of 2 or more. With two masks its variance is
    at most half the square of the largest difference between losses, for any s.

    Args:
        losses: ``(K,)``.
        masks: ``(K, U)`` bool.
        probabilities: ``(U,)``.

    Returns:
        ``(U,)``; 0 where all masks agree, as they do at probabilities of 0 and 1.

    Source: Zhou et al. 2021 (arXiv 2111.05685), as in the released code.
    """
    count = losses.shape[0]
    gaps = (losses - losses.mean()).to(probabilities.dtype)
    gradient = torch.empty_like(probabilities)
    for into, s, some in zip(*(t.split(CHUNK, -1) for t in (gradient, probabilities, masks)), strict=True):
        spread = (s * (1 - s)).sqrt()
        # The gaps sum to 0, so that their product with s may be left out: exactly 0 where masks agree.
        relative = some.to(gaps.dtype) - some[0].to(gaps.dtype)
        estimate = (gaps @ relative) / (count - 1)
        into.copy_(torch.where(spread > 0, estimate / spread, 0))
    return gradient
