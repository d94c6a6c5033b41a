"""Back to dense, and rebuilding what is derived."""

from __future__ import annotations

import copy

from torch import nn

from sparsekern.errors import InputError
from sparsekern.nn.block_sparse import BlockSparse
from sparsekern.nn.refusals import GATHER, refuse_sharded
from sparsekern.nn.select import check_model
from sparsekern.nn.swap import carry_over, swap_


def sparse_layers(model: nn.Module) -> dict[str, BlockSparse]:
    """Return the sparse layers of a model by name, without what DDP and torch.compile add to it.

    Raises:
        TypeError: not a :class:`torch.nn.Module`.
        ValueError: two layers would have one name.
    """
    check_model(model)
    layers: dict[str, BlockSparse] = {}
    for full_name, module in model.named_modules():
        if isinstance(module, BlockSparse):
            name = plain_name(model, full_name)
            if name in layers:
                raise InputError(f"two sparse layers have the name {name!r} once torch.compile's prefix is left out")
            layers[name] = module
    return layers


def plain_name(model: nn.Module, full_name: str) -> str:
    """Return ``full_name``, of a module or parameter of a model, without what DDP and torch.compile add to it."""
    wrapped = isinstance(_uncompiled(model), (nn.parallel.DistributedDataParallel, nn.DataParallel))
    parts = [part for part in full_name.split(".") if part and part != "_orig_mod"]
    return ".".join(parts[1:] if wrapped else parts)


def densify(model: nn.Module) -> nn.Module:
    """Return a copy of the model in which every sparse layer is dense, with zeros where no block is.

    The model itself is not changed. A layer that is used in several places stays one layer. A compiled model or layer
    comes out not compiled.

    Raises:
        TypeError: not a :class:`torch.nn.Module`.
        NotImplementedError: the values are sharded.

    Example:
        >>> model = sk.sparsify_(nn.Sequential(nn.Linear(64, 64)), sparsity=0.75, block_size=16)
        >>> sk.densify(model)[0]
        Linear(in_features=64, out_features=64, bias=True)
    """
    check_model(model)
    refuse_sharded(sparse_layers(model), f"densify copies whole tensors; {GATHER}, and load them into a model like it")
    model = copy.deepcopy(_uncompiled(model))  # compiled, it would go on calling the layers it was compiled for
    if isinstance(model, BlockSparse):
        dense = model.to_dense()
        carry_over(model, dense)
        return dense
    twins: dict[BlockSparse, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, BlockSparse):
            if module not in twins:
                twins[module] = module.to_dense()
            swap_(model, name.removesuffix("._orig_mod"), twins[module])
    return model


def _uncompiled(model: nn.Module) -> nn.Module:
    """Return the module that torch.compile wrapped, or the module itself."""
    while isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
        model = inner
    return model


def refresh_(model: nn.Module) -> None:
    """Rebuild the index of every sparse layer from its ``row`` and ``col``, after something wrote into them directly.

    Raises:
        ValueError: a topology is not one; nothing after that layer is rebuilt.
    """
    for layer in sparse_layers(model).values():
        layer.refresh_()
