"""Competition of all layers for blocks (``scope="global"``)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsekern.nn import BlockSparse
from sparsekern.topology import Move, to_places
from sparsekern.training.scores import ascending, descending, highest, lowest, protect_strongest


class Offer(NamedTuple):
    """Empty places of a layer that may be grown: distinct int32 keys ``(n,)``, ascending, and their scores ``(n,)``."""

    keys: Tensor
    scores: Tensor


def share_out(
    layers: dict[str, BlockSparse], strengths: dict[str, Tensor], offers: dict[str, Offer], count: int
) -> dict[str, Move]:
    """Return the moves that drop the ``count`` weakest blocks of all layers and grow the best places of all layers.

    A layer gains no more blocks than it loses and has free slots; the slots of blocks that it loses beyond its gain
    become free. The strongest block of each layer stays. Norms and scores are divided by the root of the block size, so
    that layers of different block sizes compare.

    Args:
        layers: by name.
        strengths: ``(Z,)`` of each layer; infinity where a block may not be dropped.
        offers: empty places of each layer.
        count: number of blocks to move; fewer move where there are too few places.
    """
    names = list(layers)
    sides = [math.sqrt(layers[n].grid.block[0] * layers[n].grid.block[1]) for n in names]
    # At most count of each layer: what follows is then small compared with the blocks.
    slots = [lowest(protect_strongest(strengths[n]), count) for n in names]
    places = [highest(offers[n].scores, count) for n in names]
    weak = [strengths[n][s].cpu() / side for n, s, side in zip(names, slots, sides, strict=True)]
    good = [offers[n].scores[p].cpu() / side for n, p, side in zip(names, places, sides, strict=True)]
    free = torch.tensor([int((layers[n].row < 0).sum()) for n in names], device="cpu")

    drop_order, grow_order = ascending(torch.cat(weak)), descending(torch.cat(good))
    weak_owner, good_owner = _owners(weak)[drop_order], _owners(good)[grow_order]
    rank = _rank_within(good_owner, len(names))

    count = min(count, drop_order.shape[0], grow_order.shape[0])
    while True:
        room = free + torch.bincount(weak_owner[:count], minlength=len(names))
        fits = rank < room[good_owner.long()]
        grows = min(count, int(fits.sum()))
        if grows == count:
            break
        count = grows  # fewer blocks are dropped, which leaves less room
    grown = fits.nonzero().squeeze(1)[:count]

    moves = {}
    first_slot, first_place = (_starts([t.shape[0] for t in parts]) for parts in (weak, good))
    for i, name in enumerate(names):
        device = layers[name].row.device
        dropped = slots[i][(drop_order[:count][weak_owner[:count] == i] - first_slot[i]).to(device)]
        mine = grow_order[grown[good_owner[grown] == i]] - first_place[i]
        keys = offers[name].keys[places[i][mine.sort().values.to(device)]]
        more = keys.shape[0] - dropped.shape[0]
        if more > 0:
            dropped = torch.cat([dropped, (layers[name].row < 0).nonzero().squeeze(1)[:more]])
        elif more < 0:
            keys = pad(keys, (0, -more), value=-1)
        moves[name] = to_places(dropped, keys, layers[name].grid)
    return moves


def _owners(parts: list[Tensor]) -> Tensor:
    return torch.cat([torch.full((part.shape[0],), i, dtype=torch.int32, device="cpu") for i, part in enumerate(parts)])


def _starts(sizes: list[int]) -> list[int]:
    return [sum(sizes[:i]) for i in range(len(sizes))]


def _rank_within(owner: Tensor, owners: int) -> Tensor:
    """Return, for each entry, the number of entries of the same owner before it."""
    rank = torch.empty_like(owner)
    for i in range(owners):
        mine = owner == i
        rank[mine] = torch.arange(int(mine.sum()), dtype=torch.int32, device="cpu")
    return rank
