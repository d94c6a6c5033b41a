"""What ranks must agree on: sums of answers, and the scores by which blocks are chosen."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


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
