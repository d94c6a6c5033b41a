"""SRigL: RigL with the same number of blocks in all block rows but those with few important ones, which get none.

Lasby et al., "Dynamic Sparse Training with Structured Sparsity", ICLR 2024, arXiv 2305.02299.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparsekern.nn import BlockSparse
from sparsekern.ops import Probe
from sparsekern.topology import Move, are_absent, ordered_keys, part_of, stored_blocks, to_places
from sparsekern.topology.arguments import check_number
from sparsekern.training.growth.rigl import RigL, is_dense
from sparsekern.training.scores import descending, highest

CHUNK = 2**16
"""Places that are sorted at a time."""


class SRigL(RigL):
    """Structured RigL on blocks: a constant fan-in, and ablation of neurons (Lasby et al., ICLR 2024).

    A neuron is a block row: one output if blocks are one element high. An update counts the salient places of each
    neuron: those of the layer's ``blocks - n`` strongest blocks, and the ``n = floor(drop_fraction * blocks)`` places
    of largest gradient. Neurons with too few are ablated: they lose all their blocks. The others get an equal share of
    the layer's blocks each, and what is left over goes, one block each, to those with the most salient places. A neuron
    keeps its blocks among the strongest, up to its share, and grows at its places of largest gradient up to its share.
    An ablated neuron returns when it has enough salient places. The layer's number of blocks never changes.

    Places are scored as in :class:`RigL`. Where norms do not add up, the estimates of the sketches rank them.

    Args:
        min_salient: the salient places that a neuron needs in order to stay: below 1 a fraction of the fan-in, and at
            least one; from 1 on a number.
        ablate: whether neurons are ablated. Those of the model's last layer never are.
        options: the arguments of :class:`RigL` and :class:`Method`, but for ``scope``, ``shortlist``,
            ``score_sketches``, ``regrow``, ``keep_connected`` and ``min_age``.

    Raises:
        ValueError: ``min_salient`` is negative, or what :class:`RigL` raises.
        NotImplementedError: a layer ties its taps.

    Example:
        >>> model = sk.sparsify_(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)), 0.5, 16, ignore=["1"])
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> sparse = sk.SRigL(model, optimizer, update_every=1)
        >>> loss = sparse.backward(lambda: model(torch.ones(8, 64)).square().mean())
        >>> optimizer.step(); optimizer.zero_grad()
        >>> moved = sparse.step()
        >>> fan_in = torch.bincount(model[0].row, minlength=4)
        >>> len(set(fan_in[fan_in > 0].tolist())) <= 2, sparse.metrics()["ablated/0"] in (0, 0.25, 0.5)
        (True, True)
    """

    unused_options: ClassVar[tuple[str, ...]] = (
        "scope",
        "shortlist",
        "score_sketches",
        "regrow",
        "keep_connected",
        "min_age",
    )

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        min_salient: float = 0.3,
        ablate: bool = True,
        **options: Any,
    ) -> None:
        self.check_options(options)
        check_number("min_salient", min_salient, "0 or more, and finite", lambda number: 0 <= number < math.inf)
        super().__init__(model, optimizer, **options)
        self.min_salient, self.ablate = min_salient, ablate
        last = [m for m in model.modules() if any(p.dim() > 1 for p in m.parameters(recurse=False))][-1]
        self._spared = [name for name, layer in self.layers.items() if layer is last or not ablate]

    def stages(self) -> int:
        """Return 1."""
        return 1

    def ask(self, stage: int, name: str, layer: BlockSparse) -> Probe | None:
        """Return a probe for all norms, or for sketches where norms do not add up."""
        if self._screen and not is_dense(layer):
            return self.ask_sketch(name, layer)
        return super().ask(stage, name, layer)

    def hear(self, stage: int, answers: dict[str, Tensor]) -> int | None:
        """Store the scores of all places."""
        whole = {name: answer for name, answer in answers.items() if not self._screen or is_dense(self.layers[name])}
        for name in answers.keys() - whole.keys():  # squares have the order of norms
            self._grid_scores[name] = self.ranks.from_first(answers[name].square_().mean(0).flatten())
        return super().hear(stage, whole)

    def choose(self, name: str, layer: BlockSparse, fraction: float, generator: torch.Generator) -> Move | None:
        """Return the moves that give each neuron its fan-in again; None for a layer that was not used."""
        scores, blocks = self._grid_scores.get(name), stored_blocks(layer.index)
        if scores is None or not blocks or not bool(scores.any()):
            return None
        grid, topology = layer.grid, layer.topology
        used, pruned = topology.used().nonzero().squeeze(1), part_of(blocks, fraction)
        strongest = used[descending(self.strength(name, layer)[used])]
        keys, rows = topology.keys(), topology.row.long()
        salient = strongest[: blocks - pruned]
        wanted = highest(scores, pruned).int()
        wanted = wanted[are_absent(wanted, keys[salient].sort().values, grid.cells)]
        count = _of_rows(rows[salient], grid.rows) + _of_rows(wanted.long() // grid.cols, grid.rows)

        active = self._active(name, layer, count, blocks)
        fan_in, left = divmod(blocks, int(active.count_nonzero()))
        quota = active * fan_in
        quota[highest(torch.where(active, count.float(), -torch.inf), left)] += 1
        kept = strongest[active[rows[strongest]]][: blocks - pruned]
        kept = kept[_first_of_rows(rows[kept], quota)]
        grown = _best_of_rows(scores, keys[kept].long(), quota - _of_rows(rows[kept], grid.rows))
        new = grown[are_absent(grown, ordered_keys(layer.index, topology), grid.cells)]
        others = used[~torch.isin(used, kept)]
        leaving = others[are_absent(keys[others], grown, grid.cells)]  # the rest wins its place back, with its values
        return to_places(leaving, new, grid)

    def _active(self, name: str, layer: BlockSparse, count: Tensor, blocks: int) -> Tensor:
        """Return which neurons ``(R,)`` stay, by the number of salient places ``(R,)`` of each."""
        if name in self._spared:
            return torch.ones_like(count, dtype=torch.bool)
        fan_in = blocks / int(_of_rows(layer.row[layer.row >= 0].long(), layer.grid.rows).count_nonzero())
        least = self.min_salient if self.min_salient >= 1 else max(1, int(self.min_salient * fan_in + 1e-9))
        enough = math.ceil(blocks / layer.grid.cols)  # fewer rows do not have room for the blocks
        return count >= min(least, int(count.sort(descending=True).values[enough - 1]))

    def metrics(self) -> dict[str, float]:
        """Return the metrics of :meth:`Method.metrics`, and ``ablated/*``: the fraction of neurons without a block."""
        filled = {name: _of_rows(m.row[m.row >= 0].long(), m.grid.rows) for name, m in self.layers.items()}
        return super().metrics() | {f"ablated/{name}": float((n == 0).float().mean()) for name, n in filled.items()}


def _of_rows(rows: Tensor, count: int) -> Tensor:
    """Return how often each of ``count`` rows occurs in ``rows (n,)``."""
    return torch.bincount(rows, minlength=count)


def _first_of_rows(rows: Tensor, quota: Tensor) -> Tensor:
    """Return the positions in ``rows (n,)`` of the first ``quota[r]`` entries of each row r."""
    order = rows.sort(stable=True).indices
    sizes = _of_rows(rows, quota.shape[0])
    rank = torch.arange(rows.shape[0], device=rows.device) - (sizes.cumsum(0) - sizes)[rows[order]]
    return order[rank < quota[rows[order]]]


def _best_of_rows(scores: Tensor, taken: Tensor, quota: Tensor) -> Tensor:
    """Return the keys, int32 and ascending, of the ``quota (R,)`` best places of each row that are not taken.

    Args:
        scores: ``(R * C,)``; ties go to the lower place.
        taken: ``(n,)`` keys.
        quota: at most the places of the row that are left.
    """
    cols = scores.shape[0] // quota.shape[0]
    barred = torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, taken, True).view(-1, cols)
    found = []
    for rows in quota.nonzero().squeeze(1).split(max(1, CHUNK // cols)):
        some = scores.view(-1, cols)[rows].masked_fill_(barred[rows], -torch.inf)
        best = some.sort(dim=1, descending=True, stable=True).indices
        chosen = torch.arange(cols, device=rows.device) < quota[rows, None]
        found.append((rows[:, None] * cols + best)[chosen])
    return torch.cat([taken[:0], *found]).sort().values.int()
