"""Top-KAST: the strongest blocks compute, and more are trained, from which others may rise among them.

Jayakumar et al., "Top-KAST: Top-K Always Sparse Training", NeurIPS 2020 (arXiv 2106.03517).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparsekern.errors import InputError
from sparsekern.nn import BlockSparse, lend_index
from sparsekern.nn.sharded import local, own_rows
from sparsekern.ops import stored_elements
from sparsekern.topology import Index, Move, empty_index, freeing, mask_index_, part_of, stored_blocks, units
from sparsekern.topology.arguments import check_number
from sparsekern.training.base import Method
from sparsekern.training.magnitude import grow_at_random
from sparsekern.training.scores import lowest, part_that_remains

CHUNK = 2**16
"""Number of slots whose gradient is regularized at a time."""


class TopKAST(Method):
    """Computes with the strongest blocks of each layer, the forward set, and trains all that are stored.

    Build the layers with more blocks than are to compute, and give the sparsity of the forward set as ``sparsity``.
    Training steps need the closure form, and evaluations the context :meth:`evaluation`::

        model = sk.sparsify_(model, sparsity=0.8)
        sparse = sk.TopKAST(model, optimizer, sparsity=0.9, stop=0.75 * steps)
        for x, y in loader:
            sparse.backward(lambda: loss_fn(model(x), y))
            optimizer.step(); optimizer.zero_grad(set_to_none=True)
            sparse.step()

    The forward pass and the gradient of the input compute the forward set only. The gradient of the values is computed
    for all stored blocks, the backward set of the paper: those outside of the forward set learn without an effect on
    the output. At an update the weakest of them move to places drawn uniformly among the empty ones, where they start
    from zero, and the strongest of all blocks become the forward set. A block's strength is its Frobenius norm, at 1x1
    the magnitude. At ``stop``, or in :meth:`finish`, the slots outside of the forward set become free, and training
    goes on with a fixed topology.

    The paper takes the backward set from all weights, which are dense; ``docs/methods.md`` lists all differences.

    Args:
        model: its sparse layers store the backward set.
        optimizer: holds the values of the layers.
        sparsity: fraction of the sparse layers' elements that is absent from the forward set. Each layer computes with
            the same fraction of its blocks. Default: half of the stored elements compute.
        regularization: the weight of the exploration loss: half the squared norm of the forward set, and that of the
            other blocks divided by the forward set's density. Its gradient is added before the optimizer's step, beside
            the optimizer's own decay of weights.
        drop_fraction: fraction of the blocks outside of the forward set that an update moves; see :class:`Method`.
        options: the arguments of :class:`Method`, all but ``keep_connected`` and ``min_age``.

    Raises:
        ValueError: a number is out of range, or there are fewer blocks than are to compute; or what :class:`Method`
            raises.

    Example:
        >>> model = sk.sparsify_(nn.Sequential(nn.Linear(64, 64)), sparsity=0.5, block_size=16)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> sparse = sk.TopKAST(model, optimizer, sparsity=0.75, update_every=1, stop=2)
        >>> for step in range(2):
        ...     loss = sparse.backward(lambda: model(torch.ones(8, 64)).square().mean())
        ...     optimizer.step(); optimizer.zero_grad()
        ...     moved = sparse.step()
        ...     print(moved, model[0].sparsity)
        False 0.5
        True 0.75
    """

    unused_options: ClassVar = ("keep_connected", "min_age")
    pool: ClassVar[float] = 2.0
    """Blocks to store for each block that computes, by default."""
    moves_fraction = False

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        sparsity: float | None = None,
        regularization: float = 1e-4,
        drop_fraction: float | Callable[[int], float] = 0.3,
        **options: Any,
    ) -> None:
        self.check_options(options)
        check_number("regularization", regularization, "0 or more, and finite", lambda c: 0 <= c < float("inf"))
        super().__init__(model, optimizer, drop_fraction=drop_fraction, **options)
        self.regularization = regularization
        stored = sum(layer.topology.elements() for _, layer in self.trained_layers())
        if not stored:
            raise InputError("no sparse layer that trains stores a block; Top-KAST needs one")
        whole = sum(layer.grid.numel for _, layer in self.trained_layers())
        one_each = sum(
            math.prod(layer.block_size) * (layer.grid.taps if layer.tie_taps else 1)
            for _, layer in self.trained_layers()
        )
        self._part = part_that_remains(sparsity, stored, whole, one_each)
        self.finished = False
        self._computed_at = -1
        self._forward = {name: layer.topology.used() for name, layer in self.layers.items()}
        self._lent: dict[str, tuple[Index, Tensor, tuple[int, ...]]] = {}  # with the places that it was made from
        self.settle({})

    def _outside(self, layer: BlockSparse) -> int:
        """Return the number of a layer's units that are stored outside of the forward set."""
        stored = stored_blocks(layer.index) // (layer.grid.taps if layer.tie_taps else 1)
        return 0 if self.finished else stored - max(min(1, stored), part_of(stored, self._part))

    def choose(self, name: str, layer: BlockSparse, fraction: float, generator: torch.Generator) -> Move | None:
        """Return the move of the weakest blocks, which will not be in the forward set, to empty places."""
        parts = units(layer.topology, layer.tie_taps)
        empty = parts.topology.grid.cells - stored_blocks(layer.index) // parts.size
        weakest = lowest(self.strength(name, layer, parts), min(part_of(self._outside(layer), fraction), empty))
        return grow_at_random(layer, parts, weakest, weakest.shape[0], generator)

    def settle(self, moves: dict[str, Move]) -> None:
        """Make the strongest blocks of each layer the forward set."""
        for name, layer in self.trained_layers():
            parts = units(layer.topology, layer.tie_taps)
            outside = lowest(self.strength(name, layer, parts), self._outside(layer))
            inside = self._forward[name].copy_(layer.topology.used())
            inside[(outside if parts.slots is None else parts.slots[outside.long()].flatten()).long()] = False
            if self.check_ranks:
                self.ranks.from_first(inside)

    def backward(self, closure: Callable[[], Tensor], *, scaler: torch.amp.GradScaler | None = None) -> Tensor:
        """Compute the loss with the forward set, and the gradient of all stored blocks.

        Args:
            closure: computes the loss ``()`` of one batch, the forward of the model included.
            scaler: scales the loss before the backward.

        Returns:
            The loss, detached and not scaled.
        """
        if self.finished:
            return super().backward(closure, scaler=scaler)
        self._computed_at = self.steps
        with self.writing(), self.evaluation():  # layers are lent an index
            return super().backward(closure, scaler=scaler)

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Compute, in this context, with the forward set, which :meth:`finish` would keep now."""
        with ExitStack() as stack:
            for name, layer in self.layers.items():
                stack.enter_context(self._computing(name, layer))
            yield

    def _computing(self, name: str, layer: BlockSparse) -> AbstractContextManager[None]:
        """Return a context in which a layer computes with its forward set."""
        if self.finished or not layer.values.requires_grad:
            return nullcontext()
        own = layer.index
        return lend_index(layer, self._index(name, layer), own)

    def _index(self, name: str, layer: BlockSparse) -> Index:
        """Return the index of the forward set; as long as the layer has the same tensors, in the same ones."""
        own, inside = layer.index, self._forward[name]
        versions = layer.row._version, layer.col._version, inside._version
        lent, row, made_from = self._lent.get(name, (None, None, None))
        if lent is None or row is not layer.row:
            lent, made_from = empty_index(layer.topology), None
        if versions != made_from:
            mask_index_(lent, own, inside, layer.block_size)
            self._lent[name] = lent, layer.row, versions
        return lent

    def before_step(self) -> None:
        """Add the gradient of the exploration loss.

        Raises:
            RuntimeError: the gradients are not from :meth:`backward`.
        """
        super().before_step()
        if not self.finished and self._computed_at != self.steps:
            raise RuntimeError(
                "the optimizer steps without a backward of Top-KAST: in place of loss.backward() write "
                "sparse.backward(lambda: loss_fn(model(x), y)), which computes with the forward set"
            )
        if self.regularization:
            for name, layer in self.trained_layers():
                if layer.values.grad is not None:
                    self._regularize(layer, layer.values.grad, self._forward[name])

    @torch.no_grad()
    def _regularize(self, layer: BlockSparse, gradient: Tensor, inside: Tensor) -> None:
        """Add ``regularization * w`` to a layer's gradient, outside of the forward set over the set's density."""
        values, gradient, rows = local(layer.values), local(gradient), own_rows(layer.values)
        scale = self.grad_scale
        rate = torch.full((), self.regularization, dtype=gradient.dtype, device=gradient.device)
        rate = rate if scale is None else rate * scale.to(rate)
        higher = rate * (layer.grid.cells / inside.count_nonzero().clamp(min=1)).to(rate)
        inside = inside if rows is None else inside[rows]
        for to, weights, some in zip(*(t.split(CHUNK) for t in (gradient, values, inside)), strict=True):
            to.addcmul_(weights, torch.where(some, rate, higher).view(-1, 1, 1))

    def step(self) -> bool:
        """Update the topology or finish, if that is due; returns whether blocks moved."""
        self.check_step()
        if not self.finished and self.schedule.stop is not None and self.steps >= self.schedule.stop:
            self._seen = self.steps
            return self.finish()
        return super().step()

    def finish(self) -> bool:
        """Free the slots outside of the forward set, for good; returns whether any.

        From then on :meth:`backward` is an ordinary pass.
        """
        if self.finished:
            return False
        self.check_open()
        return self.move(self._choose_final, self._end)

    def _choose_final(self, fraction: float) -> dict[str, Move]:
        return {name: freeing(layer.topology, self._forward[name]) for name, layer in self.trained_layers()}

    def _end(self, moves: dict[str, Move]) -> None:
        self._metrics.free(moves)
        self.finished = True
        self._lent.clear()

    def metrics(self) -> dict[str, float]:
        """Return the metrics of :meth:`Method.metrics`, in which ``sparsity/*`` counts all stored blocks, and one more.

        ``forward_sparsity/*`` fraction absent from the forward set.
        """
        numbers, inside = super().metrics(), 0
        for name, layer in self.layers.items():
            with self._computing(name, layer):
                elements = stored_elements(layer.index, layer.grid)
            numbers[f"forward_sparsity/{name}"] = 1 - elements / layer.grid.numel
            inside += elements
        numbers["forward_sparsity/global"] = 1 - inside / sum(layer.grid.numel for layer in self.layers.values())
        return numbers

    def compacted(self, kept: Mapping[BlockSparse, Tensor]) -> None:
        """Adapt to layers that kept only some slots."""
        super().compacted(kept)
        for name, inside in self._forward.items():
            if (slots := kept.get(self.layers[name])) is not None:
                self._forward[name] = inside.index_select(0, slots)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs in addition to the states of model and optimizer."""
        forward = {name: inside.cpu().clone() for name, inside in self._forward.items()}
        return super().state_dict() | {"finished": self.finished, "forward": forward}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self.finished, self._computed_at = state["finished"], -1
        for name, inside in self._forward.items():
            inside.copy_(state["forward"][name])
