"""How much a correction takes off the variance of the gradient, from a sample of its elements."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparsekern.errors import InputError

SAMPLED = 4096
"""Elements that are looked at, or a few less."""


class VarianceRatio:
    """The variance of one series of gradients over that of another.

    Half the mean square of the difference of two successive terms: the mean may drift along. Every n-th element of all
    parameters is looked at.

    Args:
        sizes: elements of each parameter, by name.
        device: of the sums.
    """

    def __init__(self, sizes: dict[str, int], device: torch.device) -> None:
        self._sizes = sizes
        self.stride = math.ceil(sum(sizes.values()) / SAMPLED) | 1  # odd: not one column of the blocks
        self._offsets: dict[str, int] = {}
        start = 0
        for name, size in sizes.items():
            self._offsets[name] = -start % self.stride
            start += size
        self._before: tuple[Tensor, Tensor] | None = None
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)
        self._last = 1.0

    def sample(self, name: str, tensor: Tensor | None) -> Tensor:
        """Return the chosen elements ``(n,)`` of a tensor of a parameter, in float32, as a copy; None is zeros."""
        offset, device = self._offsets[name], self._sums.device
        if tensor is None:
            count = len(range(offset, self._sizes[name], self.stride))
            return torch.zeros(count, dtype=torch.float32, device=device)
        return tensor.flatten()[offset :: self.stride].to(device, torch.float32, copy=True)

    def add(self, corrected: Tensor, plain: Tensor) -> None:
        """Take the samples of one step."""
        if self._before is not None:
            pairs = ((corrected, self._before[0]), (plain, self._before[1]))
            squares = torch.stack([(now - before).square().sum() for now, before in pairs]).double()
            self._sums += torch.where(squares.isfinite().all(), squares, 0)
        self._before = (corrected, plain)

    def skip(self) -> None:
        """Let the next step have no predecessor: blocks have moved, and elements are others."""
        self._before = None

    def restart(self) -> None:
        """Begin anew with the next step; until there are two, the ratio is the last one."""
        self._last = self.value()
        self._sums.zero_()
        self._before = None

    def value(self) -> float:
        """Return the ratio; 1 before anything was seen. Waits for the device."""
        corrected, plain = self._sums.tolist()
        return corrected / plain if plain > 0 else self._last

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"before": self._before, "sums": self._sums.clone(), "last": self._last}

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError if the samples of the step before are not as many as this takes of each."""
        count = sum(len(range(self._offsets[name], size, self.stride)) for name, size in self._sizes.items())
        for sample in state["before"] or ():
            if not isinstance(sample, Tensor) or sample.dtype != torch.float32 or sample.shape != (count,):
                raise InputError(f"the samples of the variance must be two tensors ({count},) of torch.float32")
        if state["before"] is not None and len(state["before"]) != 2:
            raise InputError("the samples of the variance must be two tensors")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken."""
        before = state["before"]
        self._before = None if before is None else (before[0].to(self._sums.device), before[1].to(self._sums.device))
        self._sums.copy_(state["sums"])
        self._last = state["last"]
