"""Back to dense, and rebuilding what is derived."""

from __future__ import annotations

import copy

from torch import nn

from sparsekern.nn.block_sparse import BlockSparse
from sparsekern.nn.linear import SparseLinear
from sparsekern.nn.swap import carry_over, swap_


def sparse_layers(model: nn.Module) -> dict[str, BlockSparse]:
    """Return the sparse layers of a model by name, without the prefixes that DDP and torch.compile add."""
    return {
        name.replace("_orig_mod.", "").removeprefix("module."): module
        for name, module in model.named_modules()
        if isinstance(module, BlockSparse)
    }


def densify(model: nn.Module) -> nn.Module:
    """Return a copy of the model in which every sparse layer is dense, with zeros where no block is.

    The model itself is not changed.
    """
    model = copy.deepcopy(model)
    if isinstance(model, SparseLinear):
        dense = model.to_dense()
        carry_over(model, dense)
        return dense
    for name, module in list(model.named_modules()):
        if isinstance(module, SparseLinear):
            swap_(model, name, module.to_dense())
    return model


def refresh_(model: nn.Module) -> None:
    """Rebuild the index of every sparse layer from its ``row`` and ``col``, after something wrote into them directly.

    Raises:
        ValueError: a topology is not one; nothing after that layer is rebuilt.
    """
    for layer in sparse_layers(model).values():
        layer.refresh_()
