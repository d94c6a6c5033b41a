"""What ranks must agree on: sums of answers, the scores by which blocks are chosen, and the blocks themselves."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from sparsekern.errors import InputError
from sparsekern.nn import BlockSparse

HASHED = 2**16
"""Slots of which :func:`topology_hash` makes whole numbers of 64 bits at a time."""


def ranks(group: dist.ProcessGroup | None = None) -> int:
    """Return how many processes train together; 1 where torch.distributed is not in use."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size(group)


def sum_over_ranks(answer: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Add up a tensor over all ranks, in place, and return it."""
    if ranks(group) > 1:
        dist.all_reduce(answer, group=group)
    return answer


def as_on_first_rank(scores: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Replace a tensor by that of the first rank, in place, and return it.

    A sum over ranks may differ in its last bit from rank to rank, and a choice among near ties with it.
    """
    if ranks(group) > 1:
        dist.broadcast(scores, src=0 if group is None else dist.get_global_rank(group, 0), group=group)
    return scores


def refuse_join(parallel: Iterable[DistributedDataParallel], method: str, group: dist.ProcessGroup | None) -> None:
    """Raise NotImplementedError if ranks that have no more batches leave the others alone, under PyTorch's ``Join``.

    They answer what DistributedDataParallel asks of them, and nothing else.
    """
    for module in parallel:
        config = getattr(module, "_join_config", None)
        if config is not None and config.enable and not config.throw_on_early_termination and ranks(group) > 1:
            raise NotImplementedError(
                f"{method} needs all ranks at each update, and under Join some have no batches left: give all ranks as "
                "many batches, such as by drop_last=True, or use Join(..., throw_on_early_termination=True)"
            )


def topology_hash(layer: BlockSparse) -> Tensor:
    """Return a number ``()``, int64, that differs where the places of a layer's slots do, all but certainly."""
    total = torch.zeros((), dtype=torch.int64, device=layer.row.device)
    for first in range(0, layer.row.shape[0], HASHED):
        row, col = layer.row[first : first + HASHED].long(), layer.col[first : first + HASHED].long()
        slot = torch.arange(first + 1, first + 1 + row.shape[0], device=row.device)
        mixed = (row + 1) * 0x9E3779B97F4A7C1 + (col + 1) * 0xC2B2AE3D27D4EB4 + slot  # wraps alike everywhere
        total += (mixed * (mixed >> 29) + slot * mixed).sum()
    return total


def check_agreement(
    facts: dict[str, object], layers: dict[str, BlockSparse], group: dist.ProcessGroup | None = None
) -> None:
    """Compare over ranks what a method is built of and where the blocks of its layers are: one number, if they agree.

    Args:
        facts: by name, whose text must be the same everywhere.
        layers: by name.
        group: of the ranks.

    Raises:
        ValueError: ranks differ; on all of them, with the name of what differs.
    """
    if ranks(group) == 1 or not layers:
        return
    hashes = torch.stack([topology_hash(layer) for layer in layers.values()]).tolist()
    mine = {what: str(fact) for what, fact in facts.items()}
    mine |= {f"the blocks of {name!r}": str(number) for name, number in zip(layers, hashes, strict=True)}
    digest = hashlib.sha256(repr(sorted(mine.items())).encode()).digest()
    number = int.from_bytes(digest[:7], "big")
    device = next(iter(layers.values())).row.device
    bounds = torch.tensor([number, -number], device=device)
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=group)
    highest, lowest = bounds.tolist()
    if highest == -lowest:
        return
    theirs: list[dict[str, str]] = [{} for _ in range(ranks(group))]
    dist.all_gather_object(theirs, mine, group=group)
    raise InputError(
        f"ranks differ in {_difference(theirs)}: build model and method alike on all, with the same seed, or broadcast "
        "the first rank's model; check_ranks=False where ranks are to train different models"
    )


def _difference(theirs: Iterable[dict[str, str]]) -> str:
    """Return the first thing in which ranks differ, and the first rank that differs from rank 0."""
    first, *others = theirs
    for what in sorted({what for facts in (first, *others) for what in facts}, key=lambda w: (w in first, w)):
        for rank, facts in enumerate(others, start=1):
            if facts.get(what) != first.get(what):
                if what.startswith("the blocks"):
                    return f"{what} (rank {rank} from rank 0)"
                return f"{what} ({first.get(what)} on rank 0, {facts.get(what)} on rank {rank})"
    raise AssertionError("ranks that differ in nothing")
