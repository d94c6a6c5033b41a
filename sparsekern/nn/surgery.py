"""Surgery on models: finding sparse layers, exchanging layers and their parameters in an optimizer, and densifying."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsekern.errors import InputError
from sparsekern.nn.block_sparse import BlockSparse
from sparsekern.nn.sharded import GATHER, refuse_sharded
from sparsekern.topology import Topology, gather_blocks, to_dense
from sparsekern.topology.arguments import check_kind

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)

_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
"""Hooks on the keys of a state dict, which dense and sparse layers name differently."""


def sparse_layers(model: nn.Module) -> dict[str, BlockSparse]:
    """Return the sparse layers of a model by name, without the prefixes that DDP and torch.compile add.

    Raises:
        TypeError: ``model`` is not a :class:`torch.nn.Module`.
        ValueError: without the prefixes two layers have the same name.
    """
    check_kind("model", model, nn.Module, "a torch.nn.Module")
    layers: dict[str, BlockSparse] = {}
    for full_name, module in model.named_modules():
        if isinstance(module, BlockSparse):
            name = plain_name(model, full_name)
            if name in layers:
                raise InputError(
                    f"model has two sparse layers named {name!r} once torch.compile's prefix is removed; rename one",
                    parameter="model",
                )
            layers[name] = module
    return layers


def plain_name(model: nn.Module, full_name: str) -> str:
    """Return the name of a module or parameter without the prefixes that DDP and torch.compile add.

    Args:
        model: the model, wrapped or not.
        full_name: a name in ``model``.
    """
    wrapped = isinstance(_uncompiled(model), (nn.parallel.DistributedDataParallel, nn.DataParallel))
    parts = [part for part in full_name.split(".") if part and part != "_orig_mod"]
    return ".".join(parts[1:] if wrapped else parts)


def densify(model: nn.Module) -> nn.Module:
    """Return a copy of the model in which every sparse layer is dense, with zeros where no block is stored.

    The model itself is not changed. A layer that is used in several places stays one layer. The copy of a compiled
    model or layer is not compiled.

    Raises:
        TypeError: ``model`` is not a :class:`torch.nn.Module`.
        NotImplementedError: the values are sharded.

    Example:
        >>> model = sk.sparsify_(nn.Sequential(nn.Linear(64, 64)), sparsity=0.75, block_size=16)
        >>> sk.densify(model)[0]
        Linear(in_features=64, out_features=64, bias=True)
    """
    _refuse_to_gather(model)
    model = copy.deepcopy(_uncompiled(model))  # a compiled copy would still call the original layers
    if isinstance(model, BlockSparse):
        dense = model.to_dense()
        carry_over(model, dense)
        return dense
    return densify_(model)


def densify_(model: nn.Module, *, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
    """Make every sparse layer of a model dense, in place, and let the optimizer continue.

    This is for dense fine-tuning after sparse pre-training. Weights where no block was stored are zero, and so is their
    optimizer state (in Adagrad and Rprop it is that of a weight before the first step). Stored blocks keep their state.
    Biases stay the same parameters; gradients of weights are dropped. Close a training method first, because it has no
    layers afterwards.

    Args:
        model: changed in place.
        optimizer: the optimizer that holds the model's parameters, changed in place; None if there is none yet.

    Returns:
        The model.

    Raises:
        TypeError: ``model`` is not a :class:`torch.nn.Module`, or ``optimizer`` is not an optimizer.
        ValueError: the model is itself a sparse layer, or the optimizer cannot continue. Nothing has changed then.
        NotImplementedError: the values are sharded.

    Example:
        >>> model = sk.sparsify_(nn.Sequential(nn.Linear(64, 64)), sparsity=0.75, block_size=16)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> sk.densify_(model, optimizer=optimizer)
        Sequential(
          (0): Linear(in_features=64, out_features=64, bias=True)
        )
    """
    _refuse_to_gather(model)
    if isinstance(model, BlockSparse):
        raise InputError(
            "model is itself a sparse layer and cannot be replaced in place; use its to_dense()", parameter="model"
        )
    names: dict[BlockSparse, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, BlockSparse):
            names.setdefault(module, []).append(name.removesuffix("._orig_mod"))
    if optimizer is not None:
        check_optimizer(optimizer, {places[0]: layer.values for layer, places in names.items()})
    exchanges = {}
    for layer, places in names.items():
        dense = layer.to_dense()
        if layer.bias is not None:
            dense.bias = layer.bias
        for name in places:
            swap_(model, name, dense)
        exchanges[places[0]] = layer.values, cast(nn.Parameter, dense.weight), layer.topology
    if optimizer is not None:
        exchange_(optimizer, exchanges)
    return model


def _refuse_to_gather(model: nn.Module) -> None:
    refuse_sharded(sparse_layers(model), f"densify copies whole tensors; {GATHER}, and load them into a model like it")


def _uncompiled(model: nn.Module) -> nn.Module:
    """Return the module that torch.compile wrapped, or the module itself."""
    while isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
        model = inner
    return model


def refresh_(model: nn.Module) -> None:
    """Rebuild the index of every sparse layer from its ``row`` and ``col``, after other code has written into them.

    Raises:
        ValueError: the places of a layer are not a valid topology; later layers are not rebuilt.
    """
    for layer in sparse_layers(model).values():
        layer.refresh_()


def swap_(model: nn.Module, name: str, new: nn.Module) -> None:
    """Replace the submodule ``name`` by ``new``, after :func:`carry_over`."""
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    carry_over(getattr(parent, child), new)
    setattr(parent, child, new)


def carry_over(old: nn.Module, new: nn.Module) -> None:
    """Give ``new`` the training flag and the hooks of ``old``, and the attributes set on its weight and bias.

    The hook dicts are shared, so their handles still remove hooks. Attributes of parameters, such as a mark that
    excludes them from weight decay, pass between the dense weight and the values. Hooks of state dicts and tensors are
    lost; :func:`lost` lists them.
    """
    new.train(old.training)
    for hooks in _HOOKS:
        setattr(new, hooks, getattr(old, hooks))
    for before, after in zip(_weight_and_bias(old), _weight_and_bias(new), strict=True):
        if before is not None and after is not None:
            for key, value in vars(before).items():
                after.__dict__.setdefault(key, value)


def lost(old: nn.Module) -> list[str]:
    """Return what :func:`carry_over` does not keep of a module, in words."""
    found = [hooks.strip("_") for hooks in _STATE_HOOKS if getattr(old, hooks)]
    for name, parameter in old.named_parameters(recurse=False):
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            found.append(f"hooks of the tensor {name}")
        if parameter.grad is not None:
            found.append(f"{name}.grad")
    return found


@contextmanager
def restored(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Copy tensors, and write their numbers back at the end."""
    kept = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, copy in kept:
                tensor.copy_(copy)


@contextmanager
def without_gradients(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Set the gradients of parameters aside, and restore them at the end."""
    kept = [(parameter, parameter.grad) for parameter in parameters]
    try:
        for parameter, _ in kept:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient


def _weight_and_bias(module: nn.Module) -> tuple[nn.Parameter | None, nn.Parameter | None]:
    own = module._parameters
    return own.get("values" if "values" in own else "weight"), own.get("bias")


Exchanges = Mapping[str, tuple[nn.Parameter, nn.Parameter, Topology]]
"""By the name of the layer: the parameter that leaves, the one that comes, and the places of the blocks."""


def check_optimizer(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
    """Check that an optimizer can go on with other forms of its parameters; nothing changes.

    Args:
        optimizer: the one in use.
        parameters: those that are to leave, by the name of their layer.

    Raises:
        TypeError: it is no optimizer.
        ValueError: it lacks a parameter that trains, or keeps a state that is not one entry a weight.
    """
    check_kind("optimizer", optimizer, torch.optim.Optimizer, "a torch.optim.Optimizer, or None")
    kind = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):
        raise InputError(
            "LBFGS keeps flat vectors over all parameters, not one entry a weight; build a new optimizer instead",
            parameter="optimizer",
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in parameters.items():
        if id(parameter) not in held:
            if parameter.requires_grad:
                raise InputError(
                    f"the weight of {name!r} is not in this optimizer; give the one that was built from the model's "
                    "parameters",
                    parameter="optimizer",
                )
            continue
        for key, value in optimizer.state.get(parameter, {}).items():
            if not (isinstance(value, Tensor) and value.numel() > 1) or value.shape == parameter.shape:
                continue
            raise InputError(
                f"{kind} keeps {key!r} of shape {tuple(value.shape)} for the weight of {name!r}, not one entry a "
                "weight; build a new optimizer instead",
                parameter="optimizer",
            )


@torch.no_grad()
def exchange_(optimizer: torch.optim.Optimizer, exchanges: Exchanges) -> None:
    """Put parameters in the places of others, in their groups, with the state of the blocks that both have.

    Entries that only the dense form has begin as an untouched weight's do. :func:`check_optimizer` must have passed.
    """
    new_of = {id(old): new for old, new, _ in exchanges.values()}
    for old, new, topology in exchanges.values():
        group = param_group(optimizer, old)
        if group is None or old not in optimizer.state:
            continue
        old_state = optimizer.state.pop(old)
        optimizer.state[new] = {
            key: _converted(value, old, new, topology, initial_entry(optimizer, key, group))
            if isinstance(value, Tensor) and value.shape == old.shape
            else value
            for key, value in old_state.items()
        }
    for group in optimizer.param_groups:
        group["params"][:] = [new_of.get(id(p), p) for p in group["params"]]


def _converted(state: Tensor, old: Tensor, new: Tensor, topology: Topology, fresh: float) -> Tensor:
    if new.shape == topology.grid.weight_shape:
        dense = to_dense(topology, state)
        if fresh:
            dense[to_dense(topology, torch.ones_like(state)) == 0] = fresh
        return dense
    return gather_blocks(topology, state)


def param_group(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any] | None:
    """Return the parameter group of the optimizer that holds this parameter, or None."""
    return next((group for group in optimizer.param_groups if any(p is parameter for p in group["params"])), None)


def initial_entry(optimizer: torch.optim.Optimizer, key: str, group: dict[str, Any]) -> float:
    """Return what an entry of a state holds before the first step in PyTorch's optimizers: zero in all but two."""
    if isinstance(optimizer, torch.optim.Adagrad) and key == "sum":
        return float(group.get("initial_accumulator_value", 0.0))
    if isinstance(optimizer, torch.optim.Rprop) and key == "step_size":
        return float(group["lr"])
    return 0.0
