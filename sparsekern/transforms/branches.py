"""The sum over branches of a ReLU, in one step that keeps one byte a number for the backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class ReluSum(torch.autograd.Function):
    """``sum_j relu(h_j)`` over the branches: never a second tensor as large as ``h``, and no float kept."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, branches: int, dim: int) -> Tensor:
        """Return the sum; ``h`` has ``branches`` times the features of the output along ``dim``, branch by branch."""
        parts = h.chunk(branches, dim)
        y = parts[0].relu()
        for part in parts[1:]:
            y += part.relu()
        ctx.save_for_backward(h > 0)
        ctx.branches, ctx.dim = branches, dim
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of ``h``: dy where it was above 0."""
        (above,) = ctx.saved_tensors
        return torch.cat([dy] * ctx.branches, ctx.dim) * above, None, None


def sum_of_branches(activation: nn.Module, h: Tensor, branches: int, dim: int) -> Tensor:
    """Return the sum over branches of the activation of ``h``, whose features along ``dim`` are branch by branch."""
    if type(activation) is nn.ReLU:
        y: Tensor = ReluSum.apply(h, branches, dim)
        return y
    return torch.stack(activation(h).chunk(branches, dim)).sum(0)
