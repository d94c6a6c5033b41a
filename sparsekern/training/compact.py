"""Giving the memory of free slots back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparsekern.errors import InputError
from sparsekern.nn import BlockSparse, refuse_sharded, sparse_layers
from sparsekern.training.attachment import acting_on, unwrapped
from sparsekern.training.optimizer_state import slot_state
from sparsekern.training.passes import parallel_modules


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
    held = optimizer is not None and old in optimizer.state
    parts = {part.key: part.tensor for part in slot_state(optimizer, old, name)} if optimizer and held else {}
    layer.keep_slots_(slots)
    if optimizer is None:
        return
    if held:
        optimizer.state[layer.values] = {
            key: parts[key].index_select(0, slots) if key in parts else entry
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
