"""The pass over batches that takes the mean gradient of a model and compares losses with a snapshot (AGENT)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparsekern.errors import InputError
from sparsekern.nn.sharded import local
from sparsekern.training.agent.snapshot import Snapshot
from sparsekern.training.distributed import Ranks
from sparsekern.training.passes import (
    ExtraCost,
    RandomState,
    backpropagate,
    extra_passes,
    loss_of,
    scale_of,
    without_gradients,
)
from sparsekern.training.scores import is_finite


class Losses(NamedTuple):
    """Mean losses of batches over all ranks, with the present weights and with the snapshot's, and sizes of batches."""

    new: list[float]
    old: list[float]
    sizes: list[float]


def pass_over(
    model: nn.Module,
    snapshot: Snapshot,
    batches: Iterable[Any],
    loss: Callable[[Any], Tensor],
    *,
    size: Callable[[Any], int] | None,
    scaler: torch.amp.GradScaler | None,
    cost: ExtraCost,
    ranks: Ranks,
) -> Losses:
    """Compute the mean gradient of the present weights over batches, into the snapshot's mean, and return losses.

    Weights, gradients, norm statistics and probes do not change. Both passes over a batch have the same dropout. The
    mean is NaN where the gradients of all batches overflow.

    Args:
        model: in training mode, as in a training step.
        snapshot: an earlier snapshot, with whose weights losses are computed too if it is taken.
        batches: of this rank; where parameters are sharded, as many as on the others.
        loss: computes the loss ``()`` of a batch.
        size: returns the number of examples that a batch counts as; None for that of its rows.
        scaler: scales losses; a batch whose gradient overflows does not count.
        cost: counts the FLOPs.
        ranks: that train one model.

    Raises:
        ValueError: there are no batches, or other numbers of them on ranks that gather parameters together.
    """
    compare = snapshot.taken
    snapshot.allocate()  # taken only when the pass is over: it may fail
    for mean in snapshot.mean.values():
        mean.zero_()
    noted: list[Tensor] = []  # (size, size * new, size * old) of each batch
    with extra_passes(model), without_gradients(model.parameters()):
        for batch, own, together in _sized(batches, size or _rows, snapshot, ranks):
            closure = partial(loss, batch)
            randomness = RandomState(model)
            with cost.counted("batch"):
                new = loss_of(closure)
                # fully_shard averages over ranks: with these weights, over the examples of all
                backpropagate(new * (ranks.count * own / max(1, together)) if snapshot.sharded else new, scaler)
                new = new.detach()
            counted = own if _add_gradients(snapshot, together, scaler, ranks) else 0
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
    rows = _over_ranks(torch.stack(noted), ranks)
    total = rows[:, 0].sum()
    for mean in snapshot.mean.values():
        (mean if snapshot.sharded else ranks.sum(mean)).div_(total.to(mean))
    rows = rows[rows[:, 0] > 0]
    sizes, new_sums, old_sums = rows.unbind(1)
    if not compare:
        return Losses([], [], [])
    return Losses((new_sums / sizes).tolist(), (old_sums / sizes).tolist(), sizes.tolist())


def _sized(
    batches: Iterable[Any], size: Callable[[Any], int], snapshot: Snapshot, ranks: Ranks
) -> Iterator[tuple[Any, int, int]]:
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
        there, together = ranks.sum(torch.tensor([batch is not absent, own], device=snapshot.device)).tolist()
        if there == 0:
            return
        if there < ranks.count:
            raise InputError(
                "ranks have other numbers of batches, and under fully_shard each pass needs all of them: give all the "
                "same number, such as by drop_last=True"
            )
        yield batch, own, together


@torch.no_grad()
def _add_gradients(snapshot: Snapshot, size: int, scaler: torch.amp.GradScaler | None, ranks: Ranks) -> bool:
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
    if ranks.any(overflowed, snapshot.device) if snapshot.sharded else overflowed:
        return False
    for name, gradient in gradients.items():
        mean = snapshot.mean[name]
        mean.add_(gradient.to(mean.dtype) * (size / scale_of(scaler, mean.device)))
    return True


def _over_ranks(rows: Tensor, ranks: Ranks) -> Tensor:
    """Sum the rows of each batch over ranks; a rank with fewer batches adds nothing to the last ones."""
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
