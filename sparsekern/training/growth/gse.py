"""GSE: grow the best of a random subset of the empty places.

Heddes, Srinivasa, Givargis and Nicolau, "Always-Sparse Training by Growing Connections with Guided Stochastic
Exploration", arXiv 2401.06898, algorithm 2.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from sparsekern.nn import BlockSparse
from sparsekern.ops import Probe
from sparsekern.topology import (
    Grid,
    distinct_absent,
    ordered_keys,
    row_weights,
    sample_absent,
    sample_absent_pairs,
    sample_pairs,
)
from sparsekern.topology.arguments import check_choice, check_number
from sparsekern.training.growth.gradient import GradientMethod

DISTRIBUTIONS = ("uniform", "grabo", "graest")


class GSE(GradientMethod):
    """Guided Stochastic Exploration on blocks.

    Before an update, a subset S of the empty places, of ``subset_factor`` times the number of the layer's blocks, is
    scored by the Frobenius norms of its blocks of the gradient, summed exactly over micro-batches and ranks. The update
    grows the ``k = min(floor(drop_fraction * blocks), |S|)`` best places, and drops the k weakest blocks. A dropped
    block does not return, and a grown one is not dropped, in the same update. With all empty places in S this is
    :class:`RigL`, with k of them :class:`SET`. Time and memory of an update are linear in the number of blocks.

    ``"uniform"``, which the paper recommends, draws S before the step whose gradient scores it. The guided
    distributions draw places (J, I) with probability proportional to ``g_J f_I``, from sums over the batch of the step
    before:

    * ``"grabo"``: ``f_I = |x_I|``, ``g_J = |dy_J|``, from the bound ``|G_JI| <= |dy_J| |x_I|``: sums of absolute values
      for 1x1 blocks, as in the paper, and Frobenius norms for larger ones.
    * ``"graest"``: ``f_I = |sum s x_I|``, ``g_J = |sum s dy_J|`` with an independent random sign s for each token, the
      same for x and dy, from an unbiased estimate of G_JI. Signs differ between micro-batches and between ranks; all
      ranks draw the same S.

    A convolution is treated as a linear layer whose tokens are the output positions: ``x_I`` is the input of some
    channels at one tap, and places of a convolution with groups are those inside a group.

    Unlike in the paper, whose code sees a batch twice, S is drawn from the batch before the one that scores it.
    ``docs/methods.md`` lists all differences from the paper and its code.

    Args:
        distribution: how pairs are drawn: ``"uniform"``, ``"grabo"`` or ``"graest"``.
        subset_factor: gamma, the size of S over the number of the layer's blocks.
        with_replacement: draw pairs independently, as in the paper: pairs that are repeated or stored are discarded, so
            that S is smaller; and take all empty places of a layer that is at least half full, as in the authors' code.
            Otherwise S has its full size.
        options: the arguments of :class:`GradientMethod` and :class:`Method`.

    Raises:
        ValueError: the distribution is unknown, or a number is out of range, here or in :class:`Method`.

    Example:
        >>> model = sk.sparsify_(nn.Sequential(nn.Linear(64, 64)), sparsity=0.75, block_size=16)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> sparse = sk.GSE(model, optimizer, update_every=2, drop_fraction=0.5)
        >>> for step in range(2):
        ...     model(torch.ones(8, 64)).square().mean().backward()
        ...     optimizer.step(); optimizer.zero_grad()
        ...     moved = sparse.step()
        >>> moved, sparse.metrics()["churn/0"]
        (True, 0.5)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        distribution: str = "uniform",
        subset_factor: float = 1.0,
        with_replacement: bool = False,
        **options: Any,
    ) -> None:
        check_choice("distribution", distribution, DISTRIBUTIONS)
        check_number("subset_factor", subset_factor, "a number above 0", lambda factor: 0 < factor < math.inf)
        super().__init__(model, optimizer, **options)
        self.distribution, self.subset_factor, self.with_replacement = distribution, subset_factor, with_replacement
        self.begin()

    def stages(self) -> int:
        """Return 1, or 2 for a guided distribution, which needs the sums of one more step."""
        return 1 if self.distribution == "uniform" else 2

    def prepare(self, stage: int) -> None:
        """Draw the candidates of the uniform distribution."""
        if self.distribution == "uniform":
            self._keys = {name: self._draw(name, layer, None) for name, layer in self.trained_layers()}

    def ask(self, stage: int, name: str, layer: BlockSparse) -> Probe:
        """Return a probe for the gradients of the candidates; in the first of two stages, for the sums to draw by."""
        if stage == self.stages() - 1:
            return self.ask_candidates(name, layer)
        device, grid = layer.row.device, layer.grid
        if self.distribution == "grabo":
            return Probe.magnitudes(grid, dtype=self.dtype(layer), device=device)
        seed = torch.randint(2**62, (), generator=self.generator(name, "signs"), device="cpu")
        return Probe.signed_sums(grid, seed.to(device), dtype=self.dtype(layer))

    def hear(self, stage: int, answers: dict[str, Tensor]) -> int | None:
        """Score the candidates; in the first of two stages, draw them."""
        if stage == self.stages() - 1:
            for name, answer in answers.items():
                self.score_candidates(name, answer)
            return None
        for name, answer in answers.items():
            layer = self.layers[name]
            sums = self.ranks.from_first(answer).cpu()
            self._keys[name] = self._draw(name, layer, weights(layer.grid, self.distribution, sums))
        return 1

    def _draw(self, name: str, layer: BlockSparse, guide: tuple[Tensor, Tensor] | None) -> Tensor:
        """Return candidates, distinct and ascending, on the CPU."""
        grid, present = layer.grid, ordered_keys(layer.index, layer.topology).cpu()
        count = math.ceil(self.subset_factor * present.shape[0] - 1e-9)
        generator = self.generator(name, "candidates")
        if guide is not None and not bool(row_weights(*guide).any()):
            return present[:0]  # the layer was not used
        if self.with_replacement:
            if 2 * present.shape[0] >= grid.cells:
                return sample_absent(present, grid.cells, grid.cells - present.shape[0], generator, ordered=True)
            if guide is None:
                drawn = torch.randint(grid.cells, (count,), generator=generator, dtype=torch.int32, device="cpu")
            else:
                drawn = sample_pairs(*guide, count, generator)
            return distinct_absent(drawn, present, grid.cells)
        count = min(count, grid.cells - present.shape[0])
        if guide is None:
            return sample_absent(present, grid.cells, count, generator, ordered=True)
        return distinct_absent(sample_absent_pairs(present, *guide, count, generator), present[:0], grid.cells)


def weights(grid: Grid, distribution: str, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Return weights of block rows ``(R,)`` and block columns ``(groups, C)`` from a probe's answer."""
    if distribution == "grabo":
        rows, cols = sums[: grid.rows], sums[grid.rows :].view(grid.groups, grid.cols)
        return (rows, cols) if grid.block == (1, 1) else (rows.sqrt(), cols.sqrt())
    out, into = sums[: grid.out_features], sums[grid.out_features :]
    rows = _norms(out.view(grid.groups, grid.group_out), grid.block[0])
    cols = _norms(into.view(grid.groups, grid.taps, grid.tap_in), grid.block[1])
    return rows.flatten(), cols.flatten(1)


def _norms(sums: Tensor, side: int) -> Tensor:
    """Return the norms of pieces of ``side`` elements of the last axis."""
    blocks = pad(sums, (0, -sums.shape[-1] % side)).unflatten(-1, (-1, side))
    norms: Tensor = torch.linalg.vector_norm(blocks, dim=-1)
    return norms
