"""The probabilities of units, the Bernoulli masks drawn by them, and passes and steps under a mask (VR-PGE)."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.nn import lend_index
from sparsekern.nn.norm import keep_norm_statistics
from sparsekern.nn.sharded import copy_slots_, full_like_rows, take_slots, without_sync
from sparsekern.nn.surgery import param_group
from sparsekern.topology import Index, Move, empty_index, freeing, mask_index_
from sparsekern.topology.arguments import check_choice, check_number
from sparsekern.training.optimizer_state import slot_state
from sparsekern.training.passes import RandomState, backpropagate, loss_of
from sparsekern.training.vrpge.budget import Budget

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}

CHUNK = 2**16
"""Number of units that are processed at a time: temporaries are many times as large as a probability."""


class Probabilities:
    """A probability ``s`` in [0, 1] for each unit, within a budget. All are equal at first.

    Args:
        budget: of the units.
        device: of the probabilities.
        rate, optimizer, clip: ``probability_rate``, ``probability_optimizer`` and ``score_clip`` of VRPGE.
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
        check_choice("probability_optimizer", optimizer, OPTIMIZERS)
        check_number("probability_rate", rate, "above 0, and finite", lambda number: 0 < number < math.inf)
        if clip is not None:
            check_number("score_clip", clip, "above 0, or None for no limit", lambda norm: norm > 0)
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
            part = self.budget.parts[name]
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
        zero = self.value.clone().zero_()
        zeros = {"step": torch.zeros(()), "exp_avg": zero, "exp_avg_sq": zero.clone()}
        found: dict[str, Any] = self._optimizer.state.get(self._value, {})
        return zeros | found

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


class MaskedLayers:
    """Layers that compute with the units of one mask at a time: each is lent an index, always in the same tensors.

    Args:
        budget: of the units of the layers.
    """

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._lent: dict[str, Index] = {}

    def slots(self, name: str, units: Tensor) -> Tensor:
        """Return the mask ``(Z,)`` of a layer's slots from a mask over all units."""
        return self._budget.candidates[name].slots(units[self._budget.parts[name]])

    def lending(self, units: Tensor) -> ExitStack:
        """Return a context in which the layers compute with the units of a mask ``(units,)`` only."""
        stack = ExitStack()
        for name, candidates in self._budget.candidates.items():
            layer = candidates.layer
            lent = self._lent.get(name)
            if lent is None or lent.row_ptr.device != layer.row.device:
                lent = self._lent[name] = empty_index(layer.topology)
            mask_index_(lent, layer.index, self.slots(name, units), layer.block_size)
            stack.enter_context(lend_index(layer, lent))
        return stack

    def leaving(self, name: str, units: Tensor) -> Move:
        """Return the move that frees the slots of a layer that are not in a mask over all units."""
        topology = self._budget.candidates[name].layer.topology
        return freeing(topology, self.slots(name, units))

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


class PartialStep:
    """A step of any optimizer on some slots of its parameters; values and state of the others do not change.

    :meth:`begin` replaces a parameter in the optimizer by a smaller one that holds the chosen slots, with their
    gradient and state, and after the step :meth:`end` copies the results back. The model's own parameters keep shape
    and address. Holds, during the step, one more copy of the chosen slots.

    Optimizers that reduce over a whole parameter (LAMB, Adafactor's relative step) reduce over the chosen slots only.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._replaced: list[tuple[Tensor, nn.Parameter, Tensor, str]] = []  # parameter, the smaller one, slots, name

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
        self._replaced.append((parameter, chosen, slots, name))

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
