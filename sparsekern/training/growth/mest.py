"""MEST: drop by magnitude and gradient together, and grow at random, in memory that does not grow.

Yuan et al., "MEST: Accurate and Fast Memory-Economic Sparse Training Framework on the Edge", NeurIPS 2021.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparsekern.errors import InputError
from sparsekern.kernels.contract import accumulate_dtype, is_finite
from sparsekern.nn import BlockSparse
from sparsekern.nn.sharded import local, reshard, slot_scores
from sparsekern.topology import Move, part_of, stored_blocks, units
from sparsekern.topology.arguments import check_number
from sparsekern.training.attachment import check_like
from sparsekern.training.magnitude import SET, grow_at_random
from sparsekern.training.scores import lowest, norms_of, protect_free, warn_of_no_room


class MEST(SET):
    """Memory-economic sparse training on blocks: elastic mutation (EM), or with a soft memory bound (EM&S).

    A block's importance is ``|w| + gradient_weight * |dL/dw|``, with the Frobenius norms of its values and of their
    gradient in the last step before the update, as the optimizer gets it. No other gradient is computed.

    An update moves the ``floor(drop_fraction * blocks)`` least important blocks to places drawn uniformly among the
    empty ones, where they start from zero. With ``soft_bound`` it grows first: as many blocks grow in free slots, and
    the next update drops the least important ones, new or old, until the layer has as many as in the beginning. So new
    blocks are judged after they have trained. The last update before ``stop`` drops, and grows none: a loop that calls
    :meth:`step` less often than after each step of the optimizer may miss it, and then keeps what has grown.

    Args:
        gradient_weight: the weight of the gradient's norm in the importance, 0 or more.
        soft_bound: grow before dropping, in the slots that are free (``capacity`` of :func:`sparsekern.sparsify_`).
        drop_fraction: as in :class:`Method`; of the blocks that a layer had in the beginning.
        anneal: as in :class:`Method`, ``"steps"`` by default where ``drop_fraction`` is a number.
        options: the arguments of :class:`Method`.

    Raises:
        ValueError: ``gradient_weight`` is negative, ``soft_bound`` lacks a ``stop``, or what :class:`Method` raises.

    Example:
        >>> model = sk.sparsify_(nn.Sequential(nn.Linear(64, 64)), sparsity=0.5, block_size=16, capacity=1.25)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> sparse = sk.MEST(model, optimizer, soft_bound=True, drop_fraction=0.25, update_every=2, stop=5)
        >>> for step in range(4):
        ...     model(torch.ones(8, 64)).square().mean().backward()
        ...     optimizer.step(); optimizer.zero_grad()
        ...     if sparse.step():
        ...         print(model[0].topology.blocks())
        10
        8
    """

    unused_options: ClassVar[tuple[str, ...]] = ("drop", "grown_values")

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        gradient_weight: float = 0.5,
        soft_bound: bool = False,
        drop_fraction: float | Callable[[int], float] = 0.2,
        anneal: str | None = None,
        **options: Any,
    ) -> None:
        self.check_options(options)
        check_number("gradient_weight", gradient_weight, "0 or more, and finite", lambda w: 0 <= w < float("inf"))
        if soft_bound and options.get("stop") is None:
            raise InputError(
                "stop is None, but with soft_bound the last update before it drops what the one before has grown; give "
                "the step",
                parameter="stop",
            )
        if anneal is None:
            anneal = "cosine" if callable(drop_fraction) else "steps"  # steps are for a number
        super().__init__(model, optimizer, drop_fraction=drop_fraction, anneal=anneal, **options)
        self.gradient_weight, self.soft_bound = gradient_weight, soft_bound
        self._gradients: dict[str, Tensor] = {}  # norms (z,) of this rank's slots, during the optimizer's step
        self._importance: dict[str, Tensor] = {}  # (Z,), from that step to the update
        if soft_bound:
            warn_of_no_room(dict(self.trained_layers()), "soft_bound is True", "leave it out")

    def importance(self, name: str, layer: BlockSparse) -> Tensor:
        """Return the importance ``(Z,)`` of each block; where a layer has no gradient, its norm."""
        importance = self._importance.get(name)
        if importance is None:
            return super().importance(name, layer)
        if not is_finite(importance):
            raise InputError(
                f"gradients or values of {name!r} hold NaN or infinity at step {self.steps}, so its blocks have no "
                "order of importance: lower the learning rate, or clip the gradients"
            )
        return protect_free(layer, importance.clone())

    def choose(self, name: str, layer: BlockSparse, fraction: float, generator: torch.Generator) -> Move | None:
        """Return the move of the least important blocks; with ``soft_bound``, of what was grown and of what grows."""
        parts = units(layer.topology, layer.tie_taps)
        target = self.first_keys[name].shape[0] // parts.size
        if not self.soft_bound or layer.topology.slots <= target * parts.size:  # no room to grow before dropping
            return super().choose(name, layer, fraction, generator)
        surplus = max(0, stored_blocks(layer.index) // parts.size - target)
        grown = 0 if self.schedule.is_last(self.steps) else part_of(target, fraction)
        return grow_at_random(layer, parts, lowest(self.strength(name, layer, parts), surplus), grown, generator)

    def update(self) -> bool:
        """Update the topology now, by the gradients of the last step that was due, or else by those that are there."""
        self.check_open()
        if self._importance:
            return super().update()
        self._importance = self._weighed(self._gradients_now())
        try:
            return super().update()
        finally:
            self._importance = {}

    def settle(self, moves: dict[str, Move]) -> None:
        """Forget the importance."""
        self._importance = {}

    def before_step(self) -> None:
        """Read the gradients of the step before an update."""
        super().before_step()
        if self.schedule.due(self.steps + 1):
            self._gradients = self._gradients_now()

    def after_step(self, made: bool) -> None:
        """Count the step, and weigh the blocks by what it left and by its gradients."""
        super().after_step(made)
        if self._gradients and made:  # gradient scaling may skip it
            self._importance = self._weighed(self._gradients)
        self._gradients = {}

    def _gradients_now(self) -> dict[str, Tensor]:
        """Return the norms ``(z,)`` of the gradients of this rank's slots."""
        reshard(self._sharded, self.layers)
        scale = self.grad_scale
        return {
            name: norms if scale is None else norms / scale
            for name, layer in self.trained_layers()
            if layer.values.grad is not None
            for norms in [norms_of(local(layer.values.grad))]
        }

    def _weighed(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the importance ``(Z,)`` of each slot of the layers with a gradient: gathered once from all shards."""
        return {
            name: slot_scores(self.layers[name].values, partial(self._weigh, gradient))
            for name, gradient in gradients.items()
        }

    def _weigh(self, gradient: Tensor, blocks: Tensor) -> Tensor:
        return norms_of(blocks).add_(gradient, alpha=self.gradient_weight)

    def compacted(self, kept: Mapping[BlockSparse, Tensor]) -> None:
        """Adapt to layers that kept only some slots."""
        super().compacted(kept)
        for name, importance in self._importance.items():
            if (slots := kept.get(self.layers[name])) is not None:
                self._importance[name] = importance.index_select(0, slots)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, including the importance of blocks between a step and its update."""
        return super().state_dict() | {"importance": ({name: part.cpu() for name, part in self._importance.items()},)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self._importance = {
            name: part.to(self.layers[name].row.device) for name, part in state["importance"][0].items()
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise what :meth:`load_state_dict` would raise, without loading anything."""
        super().check_state(state)
        saved = state["importance"][0]
        like = {
            name: torch.empty(layer.values.shape[0], dtype=accumulate_dtype(layer.values.dtype), device="meta")
            for name, layer in self.layers.items()
            if name in saved
        }
        check_like(saved, like, "state['importance']")
