"""Statistics of norm layers for a network that is no longer the one they were taken from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from sparsekern.errors import InputError
from sparsekern.topology.arguments import check_kind


@torch.no_grad()
def recalibrate_norms(model: nn.Module, batches: Iterable[Any]) -> int:
    """Take the running statistics of batch and instance norms anew, as plain means over batches.

    Needed where the blocks change for good, as at the end of VR-PGE: the statistics mix those of many networks.

    Args:
        model: its modes of training and evaluation stay as they are; dropout is off.
        batches: inputs of the model; of a tuple or list the first is taken.

    Returns:
        The number of norm layers.

    Raises:
        ValueError: no batch came, which would leave the statistics empty.
    """
    check_kind("model", model, nn.Module, "a torch.nn.Module")
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    if not norms:
        return 0
    modes = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    kept = [(b, b.clone()) for norm in norms for b in norm.buffers()]
    count = 0
    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # torch's sign for a plain mean
            norm.train()
        for batch in batches:
            model(batch[0] if isinstance(batch, (tuple, list)) else batch)
            count += 1
    finally:
        for module, training in modes.items():
            module.training = training
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        if count == 0:
            for buffer, copy in kept:
                buffer.copy_(copy)
    if count == 0:
        raise InputError(
            "batches is empty; give some of the training set, a few hundred inputs or more", parameter="batches"
        )
    return len(norms)
