"""All layers compete for blocks: the weakest are dropped and the best places grown, whichever layer they are in."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsekern.nn import BlockSparse
from sparsekern.training.followers import Move, to_places
from sparsekern.training.scores import ascending, descending


class Offer(NamedTuple):
    """Empty places of one layer: distinct int64 keys ``(n,)``, ascending, and their scores ``(n,)``."""

    keys: Tensor
    scores: Tensor


def share_out(
    layers: dict[str, BlockSparse], strengths: dict[str, Tensor], offers: dict[str, Offer], count: int
) -> dict[str, Move]:
    """Drop the ``count`` weakest blocks of all layers and grow as many of the best places.

    A layer has no more slots than it has, so what it gains beyond the blocks it loses goes to its free slots, and ends
    with them; what it loses beyond its gain becomes free. The strongest block of a layer stays. Norms and scores are
    those of an element, root mean square, so that layers of different block sizes compare.

    Args:
        layers: by name.
        strengths: ``(Z,)`` of each layer; infinity where none may be dropped.
        offers: of each layer.
        count: blocks to move; fewer do where there are too few places.
    """
    names = list(layers)
    sides = [math.sqrt(layers[n].grid.block[0] * layers[n].grid.block[1]) for n in names]
    weak = [_without_the_strongest(strengths[n]).cpu() / side for n, side in zip(names, sides, strict=True)]
    good = [offers[n].scores.cpu() / side for n, side in zip(names, sides, strict=True)]
    free = torch.tensor([int((layers[n].row < 0).sum()) for n in names])

    weak_owner, weak_all = _owners(weak), torch.cat(weak)
    good_owner, good_all = _owners(good), torch.cat(good)
    drop_order = ascending(weak_all)[: int(torch.isfinite(weak_all).sum())]
    grow_order = descending(good_all)[: int((good_all > -torch.inf).sum())]
    rank = _rank_within(good_owner[grow_order], len(names))

    count = min(count, drop_order.shape[0], grow_order.shape[0])
    while True:
        dropped = drop_order[:count]
        room = free + torch.bincount(weak_owner[dropped], minlength=len(names))
        grown = grow_order[rank < room[good_owner[grow_order]]][:count]
        if grown.shape[0] == count:
            break
        count = grown.shape[0]  # fewer are dropped, so there is less room

    moves = {}
    first_slot, first_offer = (_starts([t.shape[0] for t in parts]) for parts in (weak, good))
    for i, name in enumerate(names):
        device = layers[name].row.device
        slots = (dropped[weak_owner[dropped] == i] - first_slot[i]).to(device)
        keys = offers[name].keys[(grown[good_owner[grown] == i] - first_offer[i]).sort().values.to(device)]
        more = keys.shape[0] - slots.shape[0]
        if more > 0:
            slots = torch.cat([slots, (layers[name].row < 0).nonzero().squeeze(1)[:more]])
        elif more < 0:
            keys = pad(keys, (0, -more), value=-1)
        moves[name] = to_places(slots, keys, layers[name].grid)
    return moves


def _without_the_strongest(strength: Tensor) -> Tensor:
    """Return the strengths with infinity at the highest finite one, so that no layer is emptied."""
    finite = torch.isfinite(strength)
    return strength.index_fill(0, torch.where(finite, strength, -torch.inf).argmax(), torch.inf)


def _owners(parts: list[Tensor]) -> Tensor:
    return torch.cat([torch.full((part.shape[0],), i) for i, part in enumerate(parts)])


def _starts(sizes: list[int]) -> list[int]:
    return [sum(sizes[:i]) for i in range(len(sizes))]


def _rank_within(owner: Tensor, owners: int) -> Tensor:
    """Return how many entries of the same owner come before each one."""
    rank = torch.empty_like(owner)
    for i in range(owners):
        mine = (owner == i).nonzero().squeeze(1)
        rank[mine] = torch.arange(mine.shape[0])
    return rank
