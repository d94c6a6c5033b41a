"""What the tests of the four transforms share: layers, and their multiply-adds by the profiler."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsekern.analysis import profile

LINEAR = (nn.Linear(96, 160), torch.randn(7, 96, generator=torch.Generator().manual_seed(0)))
CONV = (
    nn.Conv2d(64, 96, 3, stride=2, padding=1, bias=False),
    torch.randn(3, 64, 8, 8, generator=torch.Generator().manual_seed(0)),
)

each_layer = pytest.mark.parametrize(("layer", "x"), [LINEAR, CONV], ids=["linear", "conv"])
each_sparsity = pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9])


def multiply_adds(module: nn.Module, x: torch.Tensor) -> int:
    return profile(nn.Sequential(module), x).multiply_adds


def spread(module: nn.Module, inputs: int) -> float:
    """Return the mean variance of the outputs for independent normal inputs, over weights that are fixed."""
    x = torch.randn(4000, inputs, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return float(module(x).var(0).mean())
