"""Passes over a batch: the loss of a closure, its backward, and the random numbers that are drawn."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sparsekern.errors import InputError


def loss_of(closure: Callable[[], Tensor]) -> Tensor:
    """Call a closure and return the loss ``()`` that it computes.

    Raises:
        TypeError: it is not a function.
        ValueError: it returns something else than a tensor of one number, or, where gradients are enabled, a tensor
            that requires no gradient.
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
    """Backpropagate a loss ``()``, scaled if there is a scaler; return it detached and not scaled."""
    (loss if scaler is None else scaler.scale(loss)).backward()
    return loss.detach()


def scale_of(scaler: torch.amp.GradScaler | None, device: torch.device) -> Tensor:
    """Return the factor ``()`` by which gradients are scaled; does not synchronise the device."""
    one = torch.ones((), device=device)
    return one if scaler is None else scaler.scale(one)


class RandomState:
    """The state of torch's global generators: that of the CPU, and of the CUDA devices that a model is on."""

    def __init__(self, model: nn.Module) -> None:
        self._devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
        self._cpu = torch.get_rng_state()
        self._cuda = [torch.cuda.get_rng_state(device) for device in self._devices]

    def restore(self) -> None:
        """Set the generators back to this state, so that dropout draws the same numbers again."""
        torch.set_rng_state(self._cpu)
        for device, state in zip(self._devices, self._cuda, strict=True):
            torch.cuda.set_rng_state(state, device)
