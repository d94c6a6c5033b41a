"""What a training step is given to compute: a closure that returns the loss of one batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparsekern.errors import InputError


def loss_of(closure: Callable[[], Tensor]) -> Tensor:
    """Return what a closure computes.

    Raises:
        TypeError: it is no function.
        ValueError: it computes something else than a tensor of one number, or, where gradients are wanted, one from
            which none flow.
    """
    if not callable(closure):
        raise TypeError(
            f"closure is a {type(closure).__name__}; it must be a function that computes the loss, such as "
            "lambda: loss_fn(model(x), y)"
        )
    loss = closure()
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"type {type(loss).__name__}"
        raise InputError(f"the closure returned a loss of {what}; it must return a tensor of one number")
    if torch.is_grad_enabled() and not loss.requires_grad:
        raise InputError("the closure returned a loss that requires no grad; compute it from the model's output")
    return loss


def backpropagate(loss: Tensor, scaler: torch.amp.GradScaler | None) -> Tensor:
    """Add the gradients of a loss ``()``, scaled if there is a scaler; returns the loss detached and not scaled."""
    (loss if scaler is None else scaler.scale(loss)).backward()
    return loss.detach()
