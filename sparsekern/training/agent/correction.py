"""AGENT's correction of gradients, its weight c, and the variance that it takes off."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsekern.errors import InputError
from sparsekern.kernels.contract import accumulate_dtype
from sparsekern.nn.sharded import local, own_rows
from sparsekern.training.agent.snapshot import Snapshot
from sparsekern.training.distributed import Ranks, sum_of_parts
from sparsekern.training.passes import (
    ExtraCost,
    backpropagate,
    extra_passes,
    loss_of,
    parallel_modules,
    scale_of,
    without_gradients,
)

ROUNDING = 1e-12
"""A variance below this fraction of the mean square is rounding: losses are float32."""

SAMPLED = 4096
"""Maximum number of elements from which the variance is estimated."""


class StepStatistics(NamedTuple):
    """Statistics of one step, not scaled: inner products of each group, and samples of gradients."""

    products: Tensor
    corrected: Tensor
    plain: Tensor
    scale: Tensor


class Correction:
    """The correction of the gradients of one optimizer step, batch by batch.

    Before the pass over a batch, ``weight * residual`` is subtracted from ``.grad``; the residual is the gradient of
    the batch at the snapshot less the snapshot's mean gradient.

    Args:
        model: see :class:`~sparsekern.training.AGENT`.
        snapshot: of the model.
        groups: the group of each parameter, by name.
        learns: whether weights are estimated from gradients; residuals are then kept until the step.
        cost: counts the FLOPs of extra passes.
        ranks: that train one model.

    Attributes:
        weights: ``gamma c`` of each group.
        averaged: number of steps in the snapshot's mean where it is taken during the steps; None where it is known.
        products: sums over steps, from which c is estimated.
        variance: of the corrected gradients relative to the plain ones.
    """

    def __init__(
        self,
        model: nn.Module,
        snapshot: Snapshot,
        groups: dict[str, str],
        *,
        learns: bool,
        cost: ExtraCost,
        ranks: Ranks,
    ) -> None:
        self._model, self._snapshot, self._learns, self._cost = model, snapshot, learns, cost
        self._ranks = ranks
        self._group = groups
        self.weights = dict.fromkeys(groups.values(), 0.0)
        self.averaged: int | None = None
        device = next(iter(snapshot.parameters.values())).device
        self.products = Products(len(self.weights), device)
        sizes = {name: p.numel() for name, p in snapshot.parameters.items()}
        rows = {name: rows for name, p in snapshot.parameters.items() if (rows := own_rows(p)) is not None}
        self.variance = VarianceRatio(sizes, device, rows)
        self.begin_step()

    def begin_step(self) -> None:
        """Clear what was kept of the batches since the last optimizer step."""
        self._residual: dict[str, Tensor] = {}  # by parameter, where c is estimated from them
        self._taken_off: Tensor | None = None  # a sample of the elements that were subtracted
        self._noted: StepStatistics | None = None
        self._left: tuple[Tensor, int] | None = None  # a gradient after the last backward, and its version

    def _is_first(self) -> bool:
        """Return whether this backward starts new gradients, rather than adding to those of an earlier one."""
        if self._left is None:
            return True
        gradients = [g for g in self._gradients().values() if g is not None]
        tensor, version = self._left
        if any(g is tensor for g in gradients) and tensor._version == version:
            return False
        left = any(bool(g.any()) for g in gradients)
        # else scaling skipped the step, and the gradients were zeroed
        return not (self._ranks.any(left, tensor.device) if self._snapshot.sharded else left)

    def _gradients(self) -> dict[str, Tensor | None]:
        """Return this rank's part of each gradient, by parameter."""
        return {n: None if p.grad is None else local(p.grad) for n, p in self._snapshot.parameters.items()}

    def _snapshot_backward(
        self, closure: Callable[[], Tensor], scaler: torch.amp.GradScaler | None, first: bool
    ) -> dict[str, Tensor]:
        """Return the gradients of a batch at the snapshot, scaled, by parameter; of the first batch less their mean."""
        snapshot = self._snapshot
        with extra_passes(self._model), snapshot.swapped(), without_gradients(self._model.parameters()):
            with self._cost.counted("snapshot"):
                backpropagate(loss_of(closure), scaler)
            found = self._gradients()
        residual = {}
        for name, gradient in found.items():
            mean = snapshot.mean[name]
            if gradient is None:  # the parameter was not used in this batch
                known = bool(mean.any())
                if not (self._ranks.any(known, mean.device) if snapshot.sharded else known):
                    continue  # on all ranks: those that hold zeros of it, or nothing, must have its gradient too
                gradient = torch.zeros_like(snapshot.values[name])
            elif gradient.is_sparse:
                raise InputError(f"{name} has a sparse gradient, which AGENT does not correct; use sparse=False")
            if first:
                gradient.sub_(mean if scaler is None else mean * scale_of(scaler, mean.device))
            residual[name] = snapshot.zero_moved_(name, gradient)
        return residual

    def subtract(self, closure: Callable[[], Tensor], scaler: torch.amp.GradScaler | None) -> None:
        """Run a batch at the snapshot, and subtract its weighted residual from ``.grad``."""
        first = self._is_first()
        if first:
            self.begin_step()
        self._correct(self._snapshot_backward(closure, scaler, first))

    def _weight(self, name: str) -> float:
        return 0.0 if self.averaged == 0 else self.weights[self._group[name]]  # there is no mean yet

    @torch.no_grad()
    def _correct(self, residual: dict[str, Tensor]) -> None:
        """Subtract residuals from the gradients before the pass, so that DDP averages both over ranks.

        Under ``fully_shard`` both are averages already.

        Empties ``residual``, so that at most one copy of the values is held.
        """
        taken_off = []
        for name, parameter in self._snapshot.parameters.items():
            r, weight = residual.pop(name, None), self._weight(name)
            sample = self.variance.sample(name, r if weight else None)
            taken_off.append(sample.mul_(weight))
            if r is None:
                continue
            if weight and parameter.grad is None:
                taken = r * -weight if self._learns else r.mul_(-weight)  # reuse its memory where possible
                parameter.grad = self._snapshot.like_parameter(name, taken)
            elif weight and parameter.grad is not None:
                local(parameter.grad).sub_(r, alpha=weight)
            if self._learns:
                whole = self._residual.get(name)
                self._residual[name] = r if whole is None else whole.add_(r)
        sample = torch.cat(taken_off)
        self._taken_off = sample if self._taken_off is None else self._taken_off.add_(sample)

    @torch.no_grad()
    def note(self, scaler: torch.amp.GradScaler | None) -> None:
        """Compute the statistics of the step from its batches so far."""
        gradients = self._gradients()
        self._left = next(((g, g._version) for g in gradients.values() if g is not None), None)
        parallel = parallel_modules(self._model)
        if not all(module.require_backward_grad_sync for module in parallel):
            return  # gradients are not reduced over ranks yet
        assert self._taken_off is not None
        if parallel:
            self._ranks.mean(self._taken_off)
            if self._learns:
                self._average_residual()
        taken_off, scale = self._taken_off, scale_of(scaler, self._taken_off.device)
        corrected = torch.cat([self.variance.sample(name, g) for name, g in gradients.items()])
        products = torch.zeros_like(self.products.sums)
        groups = list(self.weights)
        for name, r in self._residual.items():
            square, gradient = inner(r, r), gradients[name]
            product = self._weight(name) * square + (0 if gradient is None else inner(gradient, r))
            products[groups.index(self._group[name])] += torch.stack([product, square]).to(products.device)
        if self._snapshot.sharded:
            sharded = next(iter(self._snapshot.parameters.values()))
            corrected, taken_off = sum_of_parts(sharded, torch.stack([corrected, taken_off]))
            products = sum_of_parts(sharded, products)
        plain = corrected + taken_off
        self._noted = StepStatistics(products / scale.double() ** 2, corrected / scale, plain / scale, scale)

    def _average_residual(self) -> None:
        """Average the residuals over ranks; a parameter may be unused in the batches of some ranks."""
        for name, values in self._snapshot.values.items():
            r = self._residual.get(name)
            r = self._residual[name] = torch.zeros_like(values) if r is None else r
            self._ranks.mean(r)

    @torch.no_grad()
    def commit(self) -> None:
        """Add the statistics of a step that the optimizer has made."""
        noted = self._noted
        if noted is None:
            return
        self.variance.add(noted.corrected, noted.plain)
        if self.averaged != 0:
            self.products.add(noted.products)
        if self.averaged is not None:
            self.averaged += 1
            for name, r in self._residual.items():
                mean = self._snapshot.mean[name]
                mean.add_(r / (noted.scale.to(mean) * self.averaged))


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


def smoothed(c: float, estimate: float | None, alpha: float) -> float:
    """Return ``(1 - alpha) c + alpha estimate`` (equation 5), or ``c`` where there is no estimate."""
    return c if estimate is None else (1 - alpha) * c + alpha * estimate


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
