"""AGENT's correction of gradients, batch by batch, and the pass over batches that takes the mean gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sparsekern.errors import InputError
from sparsekern.kernels.contract import is_finite
from sparsekern.nn.sharded import local, own_rows, parallel_modules, sum_of_parts
from sparsekern.training.agent.snapshot import ExtraCost, Snapshot
from sparsekern.training.agent.statistics import Products, VarianceRatio, from_losses, inner
from sparsekern.training.passes import RandomState, backpropagate, loss_of, scale_of


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
        snapshot: of the model that is trained.
        groups: the group of each parameter, by name.
        learns: whether weights are estimated from gradients; residuals are then kept until the step.
        cost: counts the FLOPs of extra passes.

    Attributes:
        weights: ``gamma c`` of each group.
        averaged: number of steps in the snapshot's mean where it is taken during the steps; None where it is known.
        products: sums over steps, from which c is estimated.
        variance: of the corrected gradients relative to the plain ones.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        groups: dict[str, str],
        *,
        learns: bool,
        cost: ExtraCost,
    ) -> None:
        self._snapshot, self._group, self._learns, self._cost = snapshot, groups, learns, cost
        self.weights = dict.fromkeys(groups.values(), 0.0)
        self.averaged: int | None = None
        self.products = Products(len(self.weights), snapshot.device)
        sizes = {name: p.numel() for name, p in snapshot.parameters.items()}
        rows = {name: rows for name, p in snapshot.parameters.items() if (rows := own_rows(p)) is not None}
        self.variance = VarianceRatio(sizes, snapshot.device, rows)
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
        return not (self._snapshot.ranks.any(left, tensor.device) if self._snapshot.sharded else left)

    def _gradients(self) -> dict[str, Tensor | None]:
        """Return this rank's part of each gradient, by parameter."""
        return {n: None if p.grad is None else local(p.grad) for n, p in self._snapshot.parameters.items()}

    def _snapshot_backward(
        self, closure: Callable[[], Tensor], scaler: torch.amp.GradScaler | None, first: bool
    ) -> dict[str, Tensor]:
        """Return the gradients of a batch at the snapshot, scaled, by parameter; of the first batch less their mean."""
        snapshot = self._snapshot
        with snapshot.extra_passes(), snapshot.swapped():
            with self._cost.counted("snapshot"):
                backpropagate(loss_of(closure), scaler)
            found = self._gradients()
        residual = {}
        for name, gradient in found.items():
            mean = snapshot.mean[name]
            if gradient is None:  # the parameter was not used in this batch
                known = bool(mean.any())
                if not (self._snapshot.ranks.any(known, mean.device) if snapshot.sharded else known):
                    continue  # on all ranks: those that hold zeros of it, or nothing, must have its gradient too
                gradient = torch.zeros_like(snapshot.values[name])
            elif gradient.is_sparse:
                raise InputError(f"{name} has a sparse gradient, which AGENT does not correct; use sparse=False")
            if first:
                gradient.sub_(mean if scaler is None else mean * scale_of(scaler, mean.device))
            residual[name] = snapshot.zero_moved_(name, gradient)
        return residual

    def subtract(self, closure: Callable[[], Tensor], scaler: torch.amp.GradScaler | None) -> None:
        """Run a batch at the snapshot, and subtract its weighted residual from ``.grad``.

        Random numbers that the closure draws are drawn again in the next pass.
        """
        first = self._is_first()
        if first:
            self.begin_step()
        randomness = RandomState(self._snapshot.model)
        self._correct(self._snapshot_backward(closure, scaler, first))
        randomness.restore()

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
        parallel = parallel_modules(self._snapshot.model)
        if not all(module.require_backward_grad_sync for module in parallel):
            return  # gradients are not reduced over ranks yet
        assert self._taken_off is not None
        if parallel:
            self._snapshot.ranks.mean(self._taken_off)
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
            self._snapshot.ranks.mean(r)

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


class Losses(NamedTuple):
    """Mean losses of batches over all ranks, with the present weights and with the snapshot's, and sizes of batches."""

    new: list[float]
    old: list[float]
    sizes: list[float]

    def estimate(self) -> float | None:
        """Return c by :func:`from_losses`."""
        return from_losses(*self)


def pass_over(
    snapshot: Snapshot,
    batches: Iterable[Any],
    loss: Callable[[Any], Tensor],
    *,
    size: Callable[[Any], int] | None,
    scaler: torch.amp.GradScaler | None,
    cost: ExtraCost,
) -> Losses:
    """Compute the mean gradient of the present weights over batches, into the snapshot's mean, and return losses.

    Weights, gradients, norm statistics and probes do not change. Both passes over a batch have the same dropout. The
    mean is NaN where the gradients of all batches overflow.

    Args:
        snapshot: of a model in training mode, as in a training step. If it is taken, losses are computed with its
            weights too.
        batches: of this rank; where parameters are sharded, as many as on the others.
        loss: computes the loss ``()`` of a batch.
        size: returns the number of examples that a batch counts as; None for that of its rows.
        scaler: scales losses; a batch whose gradient overflows does not count.
        cost: counts the FLOPs.

    Raises:
        ValueError: there are no batches, or other numbers of them on ranks that gather parameters together.
    """
    compare, ranks = snapshot.taken, snapshot.ranks
    snapshot.allocate()  # taken only when the pass is over: it may fail
    for mean in snapshot.mean.values():
        mean.zero_()
    noted: list[Tensor] = []  # (size, size * new, size * old) of each batch
    with snapshot.extra_passes():
        for batch, own, together in _sized(batches, size or _rows, snapshot):
            closure = partial(loss, batch)
            randomness = RandomState(snapshot.model)
            with cost.counted("batch"):
                new = loss_of(closure)
                # fully_shard averages over ranks: with these weights, over the examples of all
                backpropagate(new * (ranks.count * own / max(1, together)) if snapshot.sharded else new, scaler)
                new = new.detach()
            counted = own if _add_gradients(snapshot, together, scaler) else 0
            old = torch.zeros_like(new)
            if compare:
                randomness.restore()
                with snapshot.swapped(), torch.no_grad(), cost.counted("compared batch"):
                    old = loss_of(closure)
            # A batch that overflowed has size 0, and must not make the sums over ranks NaN.
            pair = torch.stack([new, old]).double() * counted if counted else new.new_zeros(2, dtype=torch.float64)
            noted.append(torch.cat([pair.new_tensor([counted]), pair]))
    if not noted:
        raise InputError(
            "batches is empty; give some of the training set, a few dozen batches or more", parameter="batches"
        )
    rows = _over_ranks(torch.stack(noted), snapshot)
    total = rows[:, 0].sum()
    for mean in snapshot.mean.values():
        (mean if snapshot.sharded else ranks.sum(mean)).div_(total.to(mean))
    rows = rows[rows[:, 0] > 0]
    sizes, new_sums, old_sums = rows.unbind(1)
    if not compare:
        return Losses([], [], [])
    return Losses((new_sums / sizes).tolist(), (old_sums / sizes).tolist(), sizes.tolist())


def _sized(batches: Iterable[Any], size: Callable[[Any], int], snapshot: Snapshot) -> Iterator[tuple[Any, int, int]]:
    """Yield each batch with its number of examples, and the number of those that its gradients will be the mean of.

    The latter are those of all ranks where parameters are sharded.

    Raises:
        ValueError: ranks that share parameters have other numbers of batches; raised on all.
    """
    if not snapshot.sharded:
        for batch in batches:
            yield batch, (own := size(batch)), own
        return
    left, absent = iter(batches), object()
    while True:
        batch = next(left, absent)
        own = 0 if batch is absent else size(batch)
        there, together = snapshot.ranks.sum(torch.tensor([batch is not absent, own], device=snapshot.device)).tolist()
        if there == 0:
            return
        if there < snapshot.ranks.count:
            raise InputError(
                "ranks have other numbers of batches, and under fully_shard each pass needs all of them: give all the "
                "same number, such as by drop_last=True"
            )
        yield batch, own, together


@torch.no_grad()
def _add_gradients(snapshot: Snapshot, size: int, scaler: torch.amp.GradScaler | None) -> bool:
    """Add a batch's gradients to the mean and clear them; return False, and add none, if they overflowed."""
    gradients = {name: local(p.grad) for name, p in snapshot.parameters.items() if p.grad is not None}
    for parameter in snapshot.parameters.values():
        parameter.grad = None
    if size == 0:
        return True
    if scaler is None:
        for name, gradient in gradients.items():
            snapshot.mean[name].add_(gradient, alpha=size)
        return True
    overflowed = not all(is_finite(gradient) for gradient in gradients.values())
    if snapshot.ranks.any(overflowed, snapshot.device) if snapshot.sharded else overflowed:
        return False
    for name, gradient in gradients.items():
        mean = snapshot.mean[name]
        mean.add_(gradient.to(mean.dtype) * (size / scale_of(scaler, mean.device)))
    return True


def _over_ranks(rows: Tensor, snapshot: Snapshot) -> Tensor:
    """Sum the rows of each batch over ranks; a rank with fewer batches adds nothing to the last ones."""
    ranks = snapshot.ranks
    if ranks.count == 1:
        return rows
    most = torch.tensor(rows.shape[0], device=rows.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=ranks.group)
    padded = torch.nn.functional.pad(rows, (0, 0, 0, int(most) - rows.shape[0]))
    return ranks.sum(padded)


def _rows(batch: Any) -> int:
    """Return the number of rows of a batch's first tensor; 1 if it has none."""
    tensor = _first_tensor(batch)
    return 1 if tensor is None or tensor.dim() == 0 else tensor.shape[0]


def _first_tensor(batch: Any) -> Tensor | None:
    if isinstance(batch, Tensor):
        return batch
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    return next((found for part in parts if (found := _first_tensor(part)) is not None), None)
