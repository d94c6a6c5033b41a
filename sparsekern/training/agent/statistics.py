"""Estimates of AGENT: the weight c of its correction, and the variance that the correction removes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsekern.errors import InputError
from sparsekern.kernels.contract import accumulate_dtype

ROUNDING = 1e-12
"""A variance below this fraction of the mean square is rounding: losses are float32."""

SAMPLED = 4096
"""Maximum number of elements from which the variance is estimated."""


def from_losses(new: Sequence[float], old: Sequence[float], weights: Sequence[float]) -> float | None:
    """Return ``Cov(new, old) / Var(old)`` over batches, in [0, 1] (Lei et al. 2024, equation 4).

    Args:
        new: mean loss of each batch with the present weights.
        old: mean loss of each batch with the weights of the snapshot.
        weights: of the batches, such as their sizes.

    Returns:
        None where it is undefined: fewer than two batches, old losses that do not vary, or losses that are not finite.
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
    """Return ``E<g_new, R> / E|R|^2``, clamped to [0, 1], where R is the residual; None where R is zero.

    It minimises the variance of ``g_new - c R``: equation 3 of Lei et al. 2024 for vectors.
    """
    if not (math.isfinite(product) and math.isfinite(square)) or square <= 0:
        return None
    return clamped(product / square)


def clamped(c: float) -> float:
    """Return the nearest number in [0, 1]."""
    return min(1.0, max(0.0, c))


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product ``()`` of two tensors in float64, summed in float32 or float64."""
    dtype = accumulate_dtype(a.dtype)
    return (a.to(dtype) * b.to(dtype)).sum().double()


class Products:
    """Sums over steps of ``<g_new, R>`` and ``|R|^2`` for each group of parameters.

    Args:
        groups: number of groups.
        device: of the sums.
    """

    def __init__(self, groups: int, device: torch.device) -> None:
        self.sums = torch.zeros(groups, 2, dtype=torch.float64, device=device)

    def add(self, products: Tensor) -> None:
        """Add the products ``(groups, 2)`` of one step, unless they overflowed."""
        self.sums += torch.where(products.isfinite().all(), products, 0)

    def estimates(self) -> list[float | None]:
        """Return c of each group, and clear the sums; synchronises the device."""
        found = [from_products(product, square) for product, square in self.sums.tolist()]
        self.sums.zero_()
        return found


class VarianceRatio:
    """The ratio of the variances of two series of gradients, from a sample of their elements.

    A variance is half the mean square of the difference of successive terms, so that the mean may drift. The sample is
    every n-th element of all parameters.

    Args:
        sizes: number of elements of each parameter, by name.
        device: of the sums.
        rows: of sharded parameters those ``(n,)`` that this rank holds, ascending.
    """

    def __init__(self, sizes: dict[str, int], device: torch.device, rows: Mapping[str, Tensor] | None = None) -> None:
        self._sizes, self._rows = sizes, rows or {}
        self.stride = math.ceil(sum(sizes.values()) / SAMPLED) | 1  # odd, so that it is not one column of the blocks
        self._offsets: dict[str, int] = {}
        start = 0
        for name, size in sizes.items():
            self._offsets[name] = -start % self.stride
            start += size
        self._before: tuple[Tensor, Tensor] | None = None
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)
        self._last = 1.0

    def sample(self, name: str, tensor: Tensor | None) -> Tensor:
        """Return the sampled elements ``(n,)`` of a parameter's tensor, as a float32 copy; zeros for None.

        Of a sharded parameter the tensor is this rank's part, and elements of other ranks are zero.
        """
        offset, device = self._offsets[name], self._sums.device
        rows = self._rows.get(name)
        if tensor is not None and rows is None:
            return tensor.flatten()[offset :: self.stride].to(device, torch.float32, copy=True)
        at = torch.arange(offset, self._sizes[name], self.stride, device=device)
        sample = torch.zeros(at.shape, dtype=torch.float32, device=device)
        if tensor is not None and rows is not None and rows.numel():
            width = tensor[0].numel()
            row = torch.searchsorted(rows, at // width).clamp_(max=rows.shape[0] - 1)
            here = rows[row] == at // width
            sample[here] = tensor.flatten()[(row * width + at % width)[here]].float()
        return sample

    def add(self, corrected: Tensor, plain: Tensor) -> None:
        """Add the samples of one step."""
        if self._before is not None:
            pairs = ((corrected, self._before[0]), (plain, self._before[1]))
            squares = torch.stack([(now - before).square().sum() for now, before in pairs]).double()
            self._sums += torch.where(squares.isfinite().all(), squares, 0)
        self._before = (corrected, plain)

    def skip(self) -> None:
        """Drop the difference to the next step: blocks have moved, so that elements are not the same."""
        self._before = None

    def restart(self) -> None:
        """Clear the sums; until two more steps are added, the ratio stays as it is."""
        self._last = self.value()
        self._sums.zero_()
        self._before = None

    def value(self) -> float:
        """Return the ratio; 1 at first. Synchronises the device."""
        corrected, plain = self._sums.tolist()
        return corrected / plain if plain > 0 else self._last

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"before": self._before, "sums": self._sums.clone(), "last": self._last}

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError if the samples in a state do not have the right number of elements."""
        count = sum(len(range(self._offsets[name], size, self.stride)) for name, size in self._sizes.items())
        for sample in state["before"] or ():
            if not isinstance(sample, Tensor) or sample.dtype != torch.float32 or sample.shape != (count,):
                raise InputError(f"the samples of the variance must be two tensors ({count},) of torch.float32")
        if state["before"] is not None and len(state["before"]) != 2:
            raise InputError("the samples of the variance must be two tensors")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned."""
        before = state["before"]
        self._before = None if before is None else (before[0].to(self._sums.device), before[1].to(self._sums.device))
        self._sums.copy_(state["sums"])
        self._last = state["last"]
