"""How much of a correction to apply: the weight c of AGENT, from losses or from gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sparsekern.kernels.contract import accumulate_dtype

ROUNDING = 1e-12
"""A variance below this part of the squares is rounding: float32 losses are that exact."""


def from_losses(new: Sequence[float], old: Sequence[float], weights: Sequence[float]) -> float | None:
    """Return ``Cov(new, old) / Var(old)`` over batches, in [0, 1] (Lei et al. 2024, equation 4).

    Args:
        new: mean loss of each batch with the present weights.
        old: the same with those of the snapshot.
        weights: of the batches, such as their sizes.

    Returns:
        None where it says nothing: fewer than two batches, old losses that do not vary, or that are not finite.
    """
    total = math.fsum(weights)
    if len(new) < 2 or total <= 0 or not all(map(math.isfinite, (*new, *old))):
        return None
    mean_new = math.fsum(w * a for w, a in zip(weights, new, strict=True)) / total
    mean_old = math.fsum(w * o for w, o in zip(weights, old, strict=True)) / total
    covariance = math.fsum(w * (a - mean_new) * (o - mean_old) for w, a, o in zip(weights, new, old, strict=True))
    variance = math.fsum(w * (o - mean_old) ** 2 for w, o in zip(weights, old, strict=True))
    squares = math.fsum(w * o * o for w, o in zip(weights, old, strict=True))
    return None if variance <= ROUNDING * squares else clamped(covariance / variance)


def from_products(product: float, square: float) -> float | None:
    """Return ``E<g_new, R> / E|R|^2``, in [0, 1], with R the snapshot's gradient less its mean; None if R is nothing.

    Equation 3 of Lei et al. 2024 for vectors: what minimises the variance of ``g_new - c R``.
    """
    if not (math.isfinite(product) and math.isfinite(square)) or square <= 0:
        return None
    return clamped(product / square)


def clamped(c: float) -> float:
    """Return the nearest number in [0, 1]."""
    return min(1.0, max(0.0, c))


def smoothed(c: float, estimate: float | None, alpha: float) -> float:
    """Return ``(1 - alpha) c + alpha estimate`` (equation 5); ``c`` where there is no estimate."""
    return c if estimate is None else (1 - alpha) * c + alpha * estimate


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product ``()`` of two tensors of one shape, in float64; terms add up in float32 or more."""
    dtype = accumulate_dtype(a.dtype)
    return (a.to(dtype) * b.to(dtype)).sum().double()


class Products:
    """Adds up ``<g_new, R>`` and ``|R|^2`` of each group of parameters over steps.

    Args:
        groups: how many.
        device: of the sums.
    """

    def __init__(self, groups: int, device: torch.device) -> None:
        self.sums = torch.zeros(groups, 2, dtype=torch.float64, device=device)

    def add(self, products: Tensor) -> None:
        """Add those of one step ``(groups, 2)``; one that overflowed does not count."""
        self.sums += torch.where(products.isfinite().all(), products, 0)

    def estimates(self) -> list[float | None]:
        """Return c of each group, and begin anew; waits for the device."""
        found = [from_products(product, square) for product, square in self.sums.tolist()]
        self.sums.zero_()
        return found
