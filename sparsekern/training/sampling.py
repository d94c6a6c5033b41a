"""Bernoulli masks, and what the losses under them say about their probabilities (VR-PGE)."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_masks(probabilities: Tensor, masks: int, generator: torch.Generator) -> Tensor:
    """Draw ``(masks, U)`` bool, each entry true with its probability ``(U,)``. The generator is on the CPU."""
    drawn = torch.rand(masks, probabilities.shape[0], generator=generator, device="cpu")
    return drawn.to(probabilities.device) < probabilities  # rand() is in [0, 1): 0 is never drawn, 1 always


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
    spread = (probabilities * (1 - probabilities)).sqrt()
    # The sum of the gaps is 0, so that of gap * s may be left out: exactly 0 where masks agree.
    relative = masks.to(gaps.dtype) - masks[0].to(gaps.dtype)
    estimate = (gaps @ relative) / (count - 1)
    return torch.where(spread > 0, estimate / spread, 0)


def top_units(probabilities: Tensor, costs: Tensor, budget: float) -> Tensor:
    """Return a mask ``(U,)`` of the likeliest units whose costs together keep the budget; ties go to the first."""
    order = probabilities.argsort(descending=True, stable=True)
    fits = costs.double()[order].cumsum(0) <= budget * (1 + 1e-9)
    return torch.zeros_like(fits).index_copy_(0, order, fits)
