"""Scores of blocks, and choices among them: by layer, or by all layers in competition."""

from __future__ import annotations

import logging
import math
from typing import NamedTuple

import torch
from torch import Tensor

from sparsekern.errors import InputError
from sparsekern.kernels.contract import accumulate_dtype, ordered_bits
from sparsekern.nn import BlockSparse
from sparsekern.nn.sharded import slot_scores
from sparsekern.topology import Move, Topology, check_sparsity, part_of, places_for, stored_blocks, units

_log = logging.getLogger("sparsekern")


def warn_of_few_blocks(layers: dict[str, BlockSparse], fraction: float) -> None:
    """Log a warning of layers in which no block ever moves, because the fraction rounds down to none."""
    never = []
    for name, layer in layers.items():
        blocks = stored_blocks(layer.index)
        units = blocks // layer.grid.taps if layer.tie_taps else blocks
        if (
            fraction > 0
            and layer.values.requires_grad
            and 0 < blocks < layer.grid.cells
            and not part_of(units, fraction)
        ):
            never.append(f"{name} ({units})")
    if never:
        _log.warning(
            "drop_fraction is %s, which rounds down to no block in layers of so few, and they never move: %s. Take "
            "smaller blocks, or a larger fraction",
            fraction,
            ", ".join(never),
        )


def warn_of_no_room(layers: dict[str, BlockSparse], why: str, instead: str) -> None:
    """Log a warning if layers are to gain blocks and none has a free slot.

    Not an error: blocks still move within each layer. Single layers without free slots are not named: after loading,
    some may have filled all their slots.

    Args:
        layers: by name.
        why: the option that asks for it.
        instead: the way out, other than a model with free slots.
    """
    could = [name for name, layer in layers.items() if layer.topology.slots < layer.grid.cells]
    if could and all(stored_blocks(n.index) == n.topology.slots for n in layers.values()):
        _log.warning(
            "%s, but no layer has a free slot, so each keeps its number of blocks: %s. For layers that gain some, "
            "build the model with sparsify_(..., capacity=1.25), or %s",
            why,
            ", ".join(could),
            instead,
        )


def part_that_remains(sparsity: float | None, stored: float, whole: float, rounding: float) -> float:
    """Return which fraction of what layers store is to remain, so that they have a sparsity.

    Args:
        sparsity: fraction of the whole that is to be absent; None for half of what is stored.
        stored, whole: elements, or their costs.
        rounding: by how much less may be stored than is to remain: in each layer what remains is rounded to blocks.

    Raises:
        ValueError: the sparsity is out of range, or less is stored than is to remain.
    """
    if sparsity is None:
        return 0.5
    check_sparsity(sparsity)
    part = (1 - sparsity) * whole / stored
    if part > (1 + 1e-9) * (1 + rounding / stored):
        now, lower = 1 - stored / whole, max(0.0, 1 - 2 * (1 - sparsity))
        raise InputError(
            f"sparsity is {sparsity}, but the layers store too few blocks to choose from: they are at sparsity "
            f"{now:.4g}. Build them at a lower one, such as {lower:.4g}",
            parameter="sparsity",
        )
    return min(1.0, part)


def block_norms(layer: BlockSparse) -> Tensor:
    """Return the Frobenius norm ``(Z,)`` of each slot's block; infinity for a free slot, which is never dropped."""
    return protect_free(layer, slot_scores(layer.values, norms_of))


def protect_free(layer: BlockSparse, scores: Tensor) -> Tensor:
    """Return scores ``(Z,)`` with infinity at free slots, set in place."""
    if stored_blocks(layer.index) < layer.topology.slots:
        scores.masked_fill_(~layer.topology.used(), torch.inf)
    return scores


def norms_of(blocks: Tensor) -> Tensor:
    """Return the Frobenius norms ``(Z,)`` of blocks ``(Z, bo, bi)``."""
    dtype = accumulate_dtype(blocks.dtype)
    if blocks.shape[1:] == (1, 1):
        return blocks.flatten().to(dtype).abs()  # exact: no square that underflows
    norms: Tensor = torch.linalg.vector_norm(blocks, dim=(1, 2), dtype=dtype)
    return norms


def ascending(scores: Tensor) -> Tensor:
    """Return the positions that sort scores in ascending order; equal scores keep their order.

    Scores must be 0 or more, or infinite.
    """
    return ordered_bits(scores).sort(stable=True).indices


def descending(scores: Tensor) -> Tensor:
    """Return the positions that sort scores in descending order, as :func:`ascending`."""
    return ordered_bits(scores).neg_().sort(stable=True).indices


def lowest(scores: Tensor, count: int) -> Tensor:
    """Return the slots ``(k,)`` of the ``count`` lowest finite scores, ascending; ties go to the lower slot.

    Returns fewer where fewer scores are finite. Synchronises the device.
    """
    return places_for(scores).lowest(scores, count)


def highest(scores: Tensor, count: int) -> Tensor:
    """Return the positions ``(k,)`` of the ``count`` highest scores, ascending; ties go to the lower position.

    Scores of minus infinity are never chosen, so fewer may be returned. Synchronises the device.
    """
    return places_for(scores).highest(scores, count)


def protect_last(topology: Topology, scores: Tensor) -> Tensor:
    """Return the scores with infinity at the highest one of each block row and block column.

    Dropping finite scores then leaves at least one block in every block row and column that has any.
    """
    scores = scores.clone()
    free = ~topology.used()
    protected = torch.zeros_like(free)
    by_score = ascending(torch.where(free, -torch.inf, scores))  # the last write is the highest
    for place, count in ((topology.row, topology.grid.rows), (topology.col, topology.grid.cols)):
        rank = torch.empty_like(by_score)
        rank[by_score] = torch.arange(by_score.shape[0], device=rank.device)
        best = torch.full((count,), -1, device=rank.device)
        best.scatter_reduce_(0, place.clamp(min=0).long(), torch.where(free, -1, rank), "amax")
        protected[by_score[best[best >= 0]]] = True
    return scores.masked_fill_(protected, torch.inf)


def protect_strongest(strength: Tensor) -> Tensor:
    """Return the strengths with infinity at the highest finite one, so that a layer keeps a block."""
    finite = torch.isfinite(strength)
    return strength.index_fill(0, torch.where(finite, strength, -torch.inf).argmax(), torch.inf)


def free_slots(layer: BlockSparse) -> Tensor:
    """Return the slots ``(m,)`` of a layer that hold no block, ascending (synchronises the device)."""
    return (layer.row < 0).nonzero().squeeze(1)


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
    weak_owner, good_owner = (
        torch.arange(len(names), dtype=torch.int32, device="cpu").repeat_interleave(sizes)[order]
        for sizes, order in ((_sizes(weak), drop_order), (_sizes(good), grow_order))
    )
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
    first_slot, first_place = (_sizes(parts).cumsum(0) - _sizes(parts) for parts in (weak, good))
    for i, name in enumerate(names):
        device = layers[name].row.device
        dropped = slots[i][(drop_order[:count][weak_owner[:count] == i] - first_slot[i]).to(device)]
        mine = grow_order[grown[good_owner[grown] == i]] - first_place[i]
        keys = offers[name].keys[places[i][mine.sort().values.to(device)]]
        moves[name] = units(layers[name].topology, tied=False).replaced(dropped, keys, free_slots(layers[name]))
    return moves


def _sizes(parts: list[Tensor]) -> Tensor:
    return torch.tensor([part.shape[0] for part in parts], device="cpu")


def _rank_within(owner: Tensor, owners: int) -> Tensor:
    """Return, for each entry, the number of entries of the same owner before it."""
    rank = torch.empty_like(owner)
    for i in range(owners):
        mine = owner == i
        rank[mine] = torch.arange(int(mine.sum()), dtype=torch.int32, device="cpu")
    return rank
