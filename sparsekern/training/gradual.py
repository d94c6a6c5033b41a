"""Gradual pruning: the weakest blocks go while the network trains; and ``compact_``, which frees their memory.

Zhu and Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model compression", arXiv 1710.01878.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparsekern.errors import InputError
from sparsekern.nn import BlockSparse, refuse_sharded, sparse_layers
from sparsekern.nn.selectors import by_entry
from sparsekern.topology import Move, blocks_at, check_sparsity, stored_blocks, to_places
from sparsekern.training.attachment import acting_on, unwrapped
from sparsekern.training.base import Method
from sparsekern.training.followers import OnMove
from sparsekern.training.optimizer_state import slot_state
from sparsekern.training.passes import parallel_modules
from sparsekern.training.scores import ascending, lowest, protect_strongest, units


class Gradual(Method):
    """Gradual pruning of blocks (Zhu and Gupta 2017): frees the weakest blocks until a final sparsity is reached.

    The layers start at the sparsity that they have. That may be 0: ``sparsify_(model, 0.0, block_size=16)``. After
    optimizer step ``t`` the sparsity is that of the paper's equation 1, ::

        s(t) = final + (initial - final) * (1 - (t - start) / (last - start)) ** 3

    where ``last`` is the last update before ``stop``, which reaches ``final_sparsity``. A block's strength is its
    Frobenius norm, at 1x1 the magnitude. The slots of blocks that went are free and are never used again. Kernels do
    not compute them; ``compact=True`` gives their memory back, too, with the optimizer's work on it.

    Args:
        final_sparsity: fraction absent in the end, in [0, 1); or ``{selector: sparsity}`` with string selectors, of
            which the first match counts, as in :func:`sparsekern.sparsify_`.
        stop: see above; required.
        scope: ``"layer"``: every layer goes from its sparsity to the final one. ``"global"``: all layers together (with
            selectors, those of one entry), and the weakest of all blocks go, by norm over the root of the block size.
            The strongest block of each layer stays.
        compact: call :func:`sparsekern.compact_` after each update. The layers' ``values`` are then new parameters, and
            checkpoints resume by ``compact_(..., like=...)``.
        options: the arguments of :class:`Method`, but for those about blocks that move: ``drop_fraction``, ``anneal``,
            ``grown_state`` and ``min_age``.

    Raises:
        ValueError: an option is out of range, here or in :class:`Method`; no update is before ``stop``; the final
            sparsity is below that of all layers; or ``compact`` is asked for under DistributedDataParallel.

    Example:
        >>> model = sk.sparsify_(nn.Sequential(nn.Linear(64, 64)), sparsity=0.0, block_size=16)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> sparse = sk.Gradual(model, optimizer, final_sparsity=0.75, stop=9, update_every=2)
        >>> for step in range(8):
        ...     model(torch.ones(8, 64)).square().mean().backward()
        ...     optimizer.step(); optimizer.zero_grad()
        ...     if sparse.step():
        ...         print(model[0].sparsity)
        0.4375
        0.625
        0.75
    """

    unused_options: ClassVar[tuple[str, ...]] = ("drop_fraction", "anneal", "grown_state", "min_age")
    moves_fraction = False

    initial_sparsity: ClassVar[float] = 0.0
    """The sparsity from which the publication starts; the layers decide."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        final_sparsity: float | Mapping[str, float] = 0.9,
        scope: str = "layer",
        compact: bool = False,
        **options: Any,
    ) -> None:
        self.check_options(options)
        if scope not in ("layer", "global"):
            raise InputError(f"scope is {scope!r}; it must be 'layer' or 'global'", parameter="scope")
        super().__init__(model, optimizer, **options)
        self.scope, self.compact = scope, compact
        self._groups = self._final_blocks(model, final_sparsity)
        self.schedule.progress(0)  # raises if there is no update
        if compact:
            refuse_sharded(self.layers, "compact=True is for values that are not sharded; leave it out")
        if compact and (self._parallel or self.ranks.count > 1):
            raise InputError(
                "compact is True, but DistributedDataParallel holds the parameters: leave it out, and call compact_ on "
                "the module inside while it is not wrapped",
                parameter="compact",
            )

    def _final_blocks(
        self, model: nn.Module, final_sparsity: float | Mapping[str, float]
    ) -> list[tuple[list[str], int]]:
        """Return the groups of layers that have a common number of blocks, with the final one."""
        groups = []
        for sparsity, names in by_entry(model, self.layers, final_sparsity, "final_sparsity"):
            check_sparsity(sparsity, "final_sparsity")
            for those in [names] if self.scope == "global" else [[name] for name in names]:
                final = blocks_at(sparsity, sum(self.layers[name].grid.cells for name in those))
                groups.append((those, max(len(those), final)))
        if all(self._first_blocks(names) < final for names, final in groups):
            raise InputError(
                f"final_sparsity is {final_sparsity}, and all layers are sparser already; it must be higher, or the "
                "layers denser in the beginning",
                parameter="final_sparsity",
            )
        return groups

    def _first_blocks(self, names: list[str]) -> int:
        """Return the number of blocks that layers had in the beginning."""
        return sum(self.first_keys[name].shape[0] for name in names)

    def choose_all(self, fraction: float) -> dict[str, Move]:
        """Return the moves that free the weakest blocks of each group of layers, as many as its schedule says."""
        left = (1 - self.schedule.progress(self.steps)) ** 3
        trained = dict(self.trained_layers())
        moves: dict[str, Move] = {}
        for names, final in self._groups:
            wanted = math.floor(final + (self._first_blocks(names) - final) * left + 0.5 + 1e-9)
            surplus = sum(stored_blocks(self.layers[name].index) for name in names) - wanted
            if surplus > 0:
                moves |= self._free({name: trained[name] for name in names if name in trained}, surplus)
        return moves

    def _free(self, layers: dict[str, BlockSparse], count: int) -> dict[str, Move]:
        """Return the moves that free the ``count`` weakest blocks of some layers, in units that move together."""
        parts = {name: units(layer) for name, layer in layers.items()}
        cost = [1 if parts[name].slots is None else layer.grid.taps for name, layer in layers.items()]
        strengths = [self.strength(name, layer, parts[name]) for name, layer in layers.items()]
        if len(layers) > 1:
            strengths = [protect_strongest(strength) for strength in strengths]
        weak = [lowest(s, (2 * count + c) // (2 * c)) for s, c in zip(strengths, cost, strict=True)]  # rounded
        if len(layers) > 1:
            area = [math.prod(layer.grid.block) * c for layer, c in zip(layers.values(), cost, strict=True)]
            norms = [(s[w] / math.sqrt(a)).cpu() for s, w, a in zip(strengths, weak, area, strict=True)]
            weak = [w[chosen.to(w.device)] for w, chosen in zip(weak, _weakest(norms, cost, count), strict=True)]
        moves = {}
        for (name, layer), chosen in zip(layers.items(), weak, strict=True):
            of_units = parts[name].slots
            slots = chosen if of_units is None else of_units[chosen].flatten()
            moves[name] = to_places(slots, torch.full_like(slots, -1), layer.grid)
        return moves

    def update(self) -> bool:
        """Free blocks now, by the schedule, whether an update is due or not; returns whether any went."""
        if self.compact:
            self.check_compact()
        if not super().update():
            return False
        if self.compact:
            began = time.perf_counter()
            keep_slots_(self.layers, self.optimizer, {name: used_slots(layer) for name, layer in self.layers.items()})
            self.seconds += time.perf_counter() - began
        return True

    def follow(self, target: Tensor | nn.Module, *, layer: str | None = None, on_move: OnMove = "zero") -> None:
        """Register a copy of the model, or, without ``compact``, a tensor; see :meth:`Method.follow`."""
        if self.compact and isinstance(target, Tensor):
            raise InputError("compact is True, with which slots go: no tensor can follow them", parameter="compact")
        super().follow(target, layer=layer, on_move=on_move)


def _weakest(scores: list[Tensor], cost: list[int], count: int) -> list[Tensor]:
    """Return the positions in each list of the lowest scores of all lists, whose costs add up to about ``count``."""
    sizes = [part.shape[0] for part in scores]
    order = ascending(torch.cat(scores))
    costs = torch.tensor(cost, device="cpu").repeat_interleave(torch.tensor(sizes, device="cpu"))[order]
    chosen = torch.zeros(order.shape[0], dtype=torch.bool, device="cpu")
    chosen[order] = 2 * costs.cumsum(0) - costs <= 2 * count
    return [part.nonzero().squeeze(1) for part in chosen.split(sizes)]


def compact_(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, like: Mapping[str, Tensor] | None = None
) -> int:
    """Give the memory of free slots back: of values, gradients, optimizer state and index, layer by layer.

    The other slots keep their order, and all that is kept its bits, so the next step is the same. Call it between
    ``optimizer.step()`` and the next forward. The ``values`` of a layer with free slots become a new, smaller
    parameter, which takes the place of the old one in the model and in the optimizer. Whatever else holds the old one
    must be made anew: lists of parameters, CUDA graphs, ``DistributedDataParallel``. ``torch.compile`` compiles such a
    layer again. A training method of the layers follows, and copies of the model that follow it, unless it is VR-PGE or
    AGENT, which hold numbers for each slot.

    A run whose slots went resumes in three steps: build model, optimizer and method as in the beginning; call
    ``compact_(model, optimizer, like=saved)``; load the states.

    Args:
        model: changed in place.
        optimizer: holds the values; changed in place. None if there is none yet.
        like: the state dict of ``model`` from a checkpoint, which is to be loaded next: each layer gets as many slots
            as there, and loses the blocks in the others.

    Returns:
        The number of bytes that are free now.

    Raises:
        TypeError: ``model`` is not a :class:`torch.nn.Module`, or ``optimizer`` is not an optimizer.
        ValueError: the optimizer does not hold the values of a layer that trains, or keeps a state that cannot be split
            by slots; another tensor follows the blocks; or ``like`` has more slots than a layer. Nothing has changed.
        NotImplementedError: the model is under DistributedDataParallel or ``fully_shard``, or its method is VR-PGE or
            AGENT. Nothing has changed.

    Example:
        >>> model = sk.sparsify_(nn.Sequential(nn.Linear(64, 64)), sparsity=0.0, block_size=16)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> sparse = sk.Gradual(model, optimizer, final_sparsity=0.75, stop=2, update_every=1)
        >>> sparse.steps = 1
        >>> sparse.update(), model[0].values.shape
        (True, torch.Size([16, 16, 16]))
        >>> sk.compact_(model, optimizer) > 12 * 16 * 16 * 4, model[0].values.shape
        (True, torch.Size([4, 16, 16]))
    """
    layers = sparse_layers(model)
    if parallel_modules(model):
        raise NotImplementedError(
            "model is under DistributedDataParallel, which holds its parameters: call compact_ on the module inside, "
            "then wrap it again"
        )
    kept = {
        name: used_slots(layer) if like is None else _first_slots(model, layer, like) for name, layer in layers.items()
    }
    return keep_slots_(layers, None if optimizer is None else unwrapped(optimizer), kept)


def keep_slots_(
    layers: Mapping[str, BlockSparse], optimizer: torch.optim.Optimizer | None, kept: Mapping[str, Tensor]
) -> int:
    """Keep some slots of layers, as :func:`compact_` does; raises what it raises.

    Args:
        layers: by name.
        optimizer: holds their values, or None.
        kept: by the name of the layer, ``(n,)`` ascending slots.

    Returns:
        The number of bytes that are free now.
    """
    refuse_sharded(layers, "compact_ works before fully_shard only")
    owners = acting_on([*layers.values(), *([] if optimizer is None else [optimizer])])
    for owner in owners:
        owner.check_compact()
        if optimizer is not owner.optimizer:
            raise InputError(
                f"optimizer is not the one of the {type(owner).__name__} that moves the blocks; give that one",
                parameter="optimizer",
            )
    kept = {name: slots for name, slots in kept.items() if slots.shape[0] < layers[name].topology.slots}
    for name in kept:
        layers[name].check_not_parametrized()
        values = layers[name].values
        if optimizer is not None and (values.requires_grad or values in optimizer.state):  # frozen later
            slot_state(optimizer, values, name)  # raises if it cannot be split
    before = _bytes(layers, optimizer)
    for name, slots in kept.items():
        _keep(name, layers[name], optimizer, slots)
    for owner in owners:
        owner.compacted({layers[name]: slots for name, slots in kept.items()})
    return before - _bytes(layers, optimizer)


def used_slots(layer: BlockSparse) -> Tensor:
    """Return the slots that hold a block, or the first slot where none does, because a layer has at least one."""
    used = layer.topology.used().nonzero().squeeze(1)
    return used if used.shape[0] else used.new_zeros(1)


def _first_slots(model: nn.Module, layer: BlockSparse, like: Mapping[str, Tensor]) -> Tensor:
    """Return as many of the first slots of a layer as it has in a state dict of the model."""
    name = next(name for name, module in model.named_modules() if module is layer)
    row = like.get(f"{name}.row" if name else "row")
    slots = layer.topology.slots
    if row is None or not 1 <= row.shape[0] <= slots:
        found = "nothing" if row is None else f"{row.shape[0]} slots"
        raise InputError(
            f"like has {found} for {name!r}, which has {slots}; build the model as it was in the beginning",
            parameter="like",
        )
    return torch.arange(row.shape[0], device=layer.row.device)


def _keep(name: str, layer: BlockSparse, optimizer: torch.optim.Optimizer | None, slots: Tensor) -> None:
    """Keep some slots of a layer, and of its optimizer state."""
    old = layer.values
    layer.keep_slots_(slots)
    if optimizer is None:
        return
    if old in optimizer.state:
        parts = {part.key for part in slot_state(optimizer, old, name)}
        optimizer.state[layer.values] = {
            key: entry.index_select(0, slots) if key in parts else entry
            for key, entry in optimizer.state.pop(old).items()
        }
    for group in optimizer.param_groups:
        group["params"][:] = [layer.values if p is old else p for p in group["params"]]


def _bytes(layers: Mapping[str, BlockSparse], optimizer: torch.optim.Optimizer | None) -> int:
    """Return the bytes of layers: values, gradients, places, index, and optimizer state."""
    held = {}
    for layer in layers.values():
        state = {} if optimizer is None else optimizer.state.get(layer.values, {})
        for tensor in (layer.values, layer.values.grad, layer.row, layer.col, *layer.index, *state.values()):
            if isinstance(tensor, Tensor):
                held[id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(held.values())
