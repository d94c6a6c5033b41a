"""Bernoulli masks, and what the losses under them say about their probabilities (VR-PGE)."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 2**16
"""Units that are looked at together: what is made of them is many times as large as a probability."""


def draw_masks(probabilities: Tensor, masks: int, generator: torch.Generator) -> Tensor:
    """Draw ``(masks, U)`` bool, each entry true with its probability ``(U,)``. The generator is on the CPU."""
    drawn = torch.empty(masks, probabilities.shape[0], dtype=torch.bool, device="cpu")
    likely = probabilities.cpu().split(CHUNK)
    for mask in drawn:
        for part, below in zip(mask.split(CHUNK), likely, strict=True):
            chance = torch.rand(part.shape[0], dtype=torch.float32, generator=generator, device="cpu")
            torch.lt(chance, below, out=part)  # rand() is in [0, 1): 0 is never drawn, 1 always
    return drawn.to(probabilities.device)


def score_gradient(losses: Tensor, masks: Tensor, probabilities: Tensor) -> Tensor:
    """Estimate how the expected loss changes with each probability, from forward passes alone.

    With K masks ``m_j`` and the losses ``L_j`` that they gave on one batch, L the mean of the losses::

        g = 1 / (K - 1) * sum_j (L_j - L) * (m_j - s) / sqrt(s * (1 - s))

    Its expectation is ``sqrt(s * (1 - s))`` times the gradient, for any K of 2 or more; of two masks its variance is at
    most half the square of the largest gap between losses, whatever s.

    Args:
        losses: ``(K,)``.
        masks: ``(K, U)`` bool.
        probabilities: ``(U,)``.

    Returns:
        ``(U,)``; 0 where all masks agree, to which probabilities of 0 and 1 belong.

    Source: Zhou et al. 2021 (arXiv 2111.05685), in the form of the released code.
    """
    count = losses.shape[0]
    gaps = (losses - losses.mean()).to(probabilities.dtype)
    gradient = torch.empty_like(probabilities)
    for into, s, some in zip(*(t.split(CHUNK, -1) for t in (gradient, probabilities, masks)), strict=True):
        spread = (s * (1 - s)).sqrt()
        # The sum of the gaps is 0, so that of gap * s may be left out: exactly 0 where masks agree.
        relative = some.to(gaps.dtype) - some[0].to(gaps.dtype)
        estimate = (gaps @ relative) / (count - 1)
        into.copy_(torch.where(spread > 0, estimate / spread, 0))
    return gradient


def top_units(probabilities: Tensor, costs: Tensor, budget: float) -> Tensor:
    """Return a mask ``(U,)`` of the likeliest units whose costs together keep the budget; ties go to the first."""
    order = probabilities.argsort(descending=True, stable=True)
    fits = costs.double()[order].cumsum(0) <= budget * (1 + 1e-9)
    return torch.zeros_like(fits).index_copy_(0, order, fits)
