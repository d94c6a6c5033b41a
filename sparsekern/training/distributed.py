"""Communication between the ranks that train one model. Nothing else in training knows that there are several.

A method asks for four things: sums over ranks and the first rank's choice (:class:`Ranks`), a score of each slot and
which slots are on this rank (:mod:`sparsekern.nn.sharded`). One process, DistributedDataParallel and ``fully_shard``
differ in the answers only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from sparsekern.errors import InputError
from sparsekern.nn import BlockSparse
from sparsekern.topology import Move

HASHED = 2**16
"""Number of slots that :func:`topology_hash` converts to 64-bit integers at a time."""

# under other names before PyTorch 2.13; absent where PyTorch was built without torch.distributed
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


@dataclass(frozen=True)
class Ranks:
    """The processes that train one model together.

    Args:
        group: their process group. None: all processes, where ``torch.distributed`` is in use.
    """

    group: dist.ProcessGroup | None = None

    @property
    def count(self) -> int:
        """The number of ranks: 1 where ``torch.distributed`` is not in use."""
        return dist.get_world_size(self.group) if dist.is_available() and dist.is_initialized() else 1

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all ranks, in place, and return it."""
        if self.count > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        """Average a tensor over all ranks, in place, and return it."""
        return self.sum(tensor).div_(self.count)

    def measures(self, parts: Tensor, measure: Callable[[Tensor], Tensor]) -> Tensor:
        """Return a number ``(n,)`` for each row of the sum of a tensor over ranks, the same on all of them.

        Each rank adds up some rows and measures them: half the bytes of a sum that all have.

        Args:
            parts: ``(n, ...)`` of this rank.
            measure: returns a number ``(m,)`` for each of some rows ``(m, ...)``.
        """
        if self.count == 1 or not parts.shape[0]:
            return measure(parts)
        rows = -(-parts.shape[0] // self.count)
        padded = torch.cat([parts, parts.new_zeros(rows * self.count - parts.shape[0], *parts.shape[1:])])
        own = torch.empty_like(padded[:rows])
        _reduce_scatter(own, padded, group=self.group)
        numbers = measure(own)
        gathered = numbers.new_empty(rows * self.count)
        _all_gather(gathered, numbers, group=self.group)
        return gathered[: parts.shape[0]]

    def union(self, keys: Tensor) -> Tensor:
        """Return the distinct keys ``(m,)`` of all ranks, ascending, from as many ``(n,)`` on each."""
        if self.count == 1 or not keys.numel():
            return keys
        gathered = keys.new_empty(keys.shape[0] * self.count)
        _all_gather(gathered, keys, group=self.group)
        distinct: Tensor = gathered.unique()
        return distinct

    def any(self, flag: bool, device: torch.device) -> bool:
        """Return whether it is true on any rank; the device is one of whose tensors ranks send."""
        if self.count == 1:
            return flag
        flags = torch.tensor(flag, dtype=torch.int32, device=device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.group)
        return bool(flags)

    def from_first(self, tensor: Tensor) -> Tensor:
        """Overwrite a tensor with that of the first rank, in place, and return it.

        Needed before a choice: a sum over ranks may differ in its last bit from rank to rank, and a choice among near
        ties with it.
        """
        if self.count > 1:
            first = 0 if self.group is None else dist.get_global_rank(self.group, 0)
            dist.broadcast(tensor, src=first, group=self.group)
        return tensor

    def first_choice(self, moves: dict[str, Move], layers: dict[str, BlockSparse]) -> dict[str, Move]:
        """Return the moves that the first rank chose, by layer. Sends three integers a block, and one a layer."""
        if self.count == 1:
            return moves
        device = next(iter(layers.values())).row.device
        sizes = [moves[name].slots.numel() if name in moves else 0 for name in layers]
        counts = self.from_first(torch.tensor(sizes, device=device)).tolist()
        chosen = torch.empty(3, sum(counts), dtype=torch.int32, device=device)
        parts = dict(zip(layers, chosen.split(counts, 1), strict=True))
        if counts == sizes:
            for name, move in moves.items():
                parts[name].copy_(torch.stack([part.to(device, torch.int32) for part in move]))
        self.from_first(chosen)
        return {name: Move(*part.to(layers[name].row.device)) for name, part in parts.items() if part.numel()}

    def refuse_join(self, parallel: Iterable[DistributedDataParallel], method: str) -> None:
        """Raise NotImplementedError under PyTorch's ``Join``, in which some ranks have no batches left.

        Such ranks join the collectives of DistributedDataParallel, and no others.
        """
        for module in parallel:
            config = getattr(module, "_join_config", None)
            if config is not None and config.enable and not config.throw_on_early_termination and self.count > 1:
                raise NotImplementedError(
                    f"{method} needs all ranks at each update, and under Join some have no batches left: give all "
                    "ranks as many batches, such as by drop_last=True, or use "
                    "Join(..., throw_on_early_termination=True)"
                )

    def check_agreement(self, facts: dict[str, object], layers: dict[str, BlockSparse]) -> None:
        """Check that all ranks built a method alike and have the same blocks. Sends one integer if they do.

        Args:
            facts: settings by name; their text must be the same on all ranks.
            layers: sparse layers by name.

        Raises:
            ValueError: ranks differ. Raised on all ranks, with the name of what differs.
        """
        if self.count == 1 or not layers:
            return
        hashes = torch.stack([topology_hash(layer) for layer in layers.values()]).tolist()
        mine = {what: str(fact) for what, fact in facts.items()}
        mine |= {f"the blocks of {name!r}": str(number) for name, number in zip(layers, hashes, strict=True)}
        digest = hashlib.sha256(repr(sorted(mine.items())).encode()).digest()
        number = int.from_bytes(digest[:7], "big")
        device = next(iter(layers.values())).row.device
        bounds = torch.tensor([number, -number], device=device)
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=self.group)
        highest, lowest = bounds.tolist()
        if highest == -lowest:
            return
        theirs: list[dict[str, str]] = [{} for _ in range(self.count)]
        dist.all_gather_object(theirs, mine, group=self.group)
        raise InputError(
            f"ranks differ in {_difference(theirs)}: build model and method alike on all, with the same seed, or "
            "broadcast the first rank's model; check_ranks=False where ranks are to train different models"
        )


def topology_hash(layer: BlockSparse) -> Tensor:
    """Return an int64 ``()`` that differs, almost certainly, between layers with different blocks or slots."""
    total = torch.zeros((), dtype=torch.int64, device=layer.row.device)
    for first in range(0, layer.row.shape[0], HASHED):
        row, col = layer.row[first : first + HASHED].long(), layer.col[first : first + HASHED].long()
        slot = torch.arange(first + 1, first + 1 + row.shape[0], device=row.device)
        mixed = (row + 1) * 0x9E3779B97F4A7C1 + (col + 1) * 0xC2B2AE3D27D4EB4 + slot  # overflow wraps, on every device
        total += (mixed * (mixed >> 29) + slot * mixed).sum()
    return total


def _difference(theirs: list[dict[str, str]]) -> str:
    """Return the first fact in which a rank differs from rank 0, and the first such rank; one does."""
    first, *others = theirs
    names = sorted({what for facts in theirs for what in facts}, key=lambda w: (w in first, w))
    what, rank = next((w, i) for w in names for i, facts in enumerate(others, 1) if facts.get(w) != first.get(w))
    if what.startswith("the blocks"):
        return f"{what} (rank {rank} from rank 0)"
    return f"{what} ({first.get(what)} on rank 0, {theirs[rank].get(what)} on rank {rank})"
