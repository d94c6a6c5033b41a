"""The pass of AGENT over batches: the mean gradient of the present weights, and losses beside those of the snapshot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparsekern.errors import InputError
from sparsekern.training.agent.extra import ExtraCost
from sparsekern.training.agent.snapshot import Snapshot
from sparsekern.training.closures import backpropagate, loss_of
from sparsekern.training.distributed import ranks, sum_over_ranks
from sparsekern.training.passes import Randomness, extra_passes, scale_of, without_gradients
from sparsekern.training.scores import is_finite


class Losses(NamedTuple):
    """Mean losses of batches, over all ranks: of the present weights and of the snapshot's, and the batches' sizes."""

    new: list[float]
    old: list[float]
    sizes: list[float]


def pass_over(
    model: nn.Module,
    snapshot: Snapshot,
    batches: Iterable[Any],
    loss: Callable[[Any], Tensor],
    *,
    scaler: torch.amp.GradScaler | None,
    cost: ExtraCost,
    group: dist.ProcessGroup | None,
) -> Losses:
    """Write the mean gradient of the present weights into the snapshot's mean, and return losses.

    Weights, gradients, statistics of norms and probes stay as they are. Both passes over a batch see the same dropout.
    The mean is NaN where no batch counts.

    Args:
        model: in the mode it trains in.
        snapshot: the earlier one, whose losses are wanted; one that is not taken has none.
        batches: of this rank; one counts by its rows.
        loss: of a batch, ``()``.
        scaler: scales losses; a batch whose gradient overflows does not count.
        cost: takes the FLOPs.
        group: of the ranks.

    Raises:
        ValueError: no batch came.
    """
    compare = snapshot.taken
    snapshot.allocate()  # not taken before the pass is over: one that fails leaves nothing to compare with
    for mean in snapshot.mean.values():
        mean.zero_()
    noted: list[Tensor] = []  # of each batch (size, size * new, size * old)
    with extra_passes(model), without_gradients(model):
        for batch in batches:
            closure = partial(loss, batch)
            randomness = Randomness(model)
            with cost.counted("batch"):
                new = backpropagate(loss_of(closure), scaler)
            size = _rows(batch) if _add_gradients(snapshot, _rows(batch), scaler) else 0
            old = torch.zeros_like(new)
            if compare:
                randomness.restore()
                with snapshot.swapped(), torch.no_grad(), cost.counted("compared batch"):
                    old = loss_of(closure)
            # One that overflowed has no size, and must not make a NaN of the sums over ranks.
            pair = torch.stack([new, old]).double() * size if size else new.new_zeros(2, dtype=torch.float64)
            noted.append(torch.cat([pair.new_tensor([size]), pair]))
    if not noted:
        raise InputError(
            "batches is empty; give some of the training set, a few dozen batches or more", parameter="batches"
        )
    rows = _over_ranks(torch.stack(noted), group)
    total = rows[:, 0].sum()
    for mean in snapshot.mean.values():
        sum_over_ranks(mean, group).div_(total.to(mean))
    rows = rows[rows[:, 0] > 0]
    sizes, new_sums, old_sums = rows.unbind(1)
    if not compare:
        return Losses([], [], [])
    return Losses((new_sums / sizes).tolist(), (old_sums / sizes).tolist(), sizes.tolist())


@torch.no_grad()
def _add_gradients(snapshot: Snapshot, size: int, scaler: torch.amp.GradScaler | None) -> bool:
    """Add a batch's gradients to the mean and drop them; returns False, adding none, if they overflowed."""
    gradients = {name: p.grad for name, p in snapshot.parameters.items() if p.grad is not None}
    for parameter in snapshot.parameters.values():
        parameter.grad = None
    if scaler is None:
        for name, gradient in gradients.items():
            snapshot.mean[name].add_(gradient, alpha=size)
        return True
    if not all(is_finite(gradient) for gradient in gradients.values()):
        return False
    for name, gradient in gradients.items():
        mean = snapshot.mean[name]
        mean.add_(gradient.to(mean.dtype) * (size / scale_of(scaler, mean.device)))
    return True


def _over_ranks(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Add up what ranks noted of each batch; a rank that had fewer batches adds nothing to the last ones."""
    if ranks(group) == 1:
        return rows
    most = torch.tensor(rows.shape[0], device=rows.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
    padded = torch.nn.functional.pad(rows, (0, 0, 0, int(most) - rows.shape[0]))
    return sum_over_ranks(padded, group)


def _rows(batch: Any) -> int:
    """Return the rows of a batch's first tensor; 1 if there is none."""
    tensor = _first_tensor(batch)
    return 1 if tensor is None or tensor.dim() == 0 else tensor.shape[0]


def _first_tensor(batch: Any) -> Tensor | None:
    if isinstance(batch, Tensor):
        return batch
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    return next((found for part in parts if (found := _first_tensor(part)) is not None), None)
