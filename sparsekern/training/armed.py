"""Probes that are armed, and what they have heard so far."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sparsekern.nn import BlockSparse
from sparsekern.ops import Probe
from sparsekern.training.distributed import sum_over_ranks

STREAMED = ("norms", "all_norms")
"""Kinds of probe whose answers do not add up."""


class Answer(NamedTuple):
    """What a layer's probe heard: the sum over backwards and ranks, and how many backwards of this rank it was."""

    value: Tensor
    backwards: int


class ArmedProbes:
    """The probes of some layers, by name, from :meth:`arm` to :meth:`disarm`.

    Args:
        layers: by name.
    """

    def __init__(self, layers: dict[str, BlockSparse]) -> None:
        self._layers = layers
        self.probes: dict[str, Probe] = {}
        self._counters: dict[str, tuple[Tensor, int]] = {}  # of streamed probes: the zeros, and their version

    def arm(self, name: str, probe: Probe) -> None:
        """Let a layer answer a probe from its next forward on."""
        self.probes[name] = self._layers[name].probe = probe
        self.clear(name)

    def disarm(self) -> None:
        """Ask nothing any more."""
        for name in self.probes:
            self._layers[name].probe = None
        self.probes, self._counters = {}, {}

    def clear(self, name: str) -> None:
        """Let a probe have heard nothing."""
        probe = self.probes[name]
        probe.tensor.grad = None
        if probe.kind in STREAMED:  # autograd adds in place to what is there: its version counts the backwards
            zeros = torch.zeros(probe.tensor.shape, dtype=probe.tensor.dtype, device=probe.tensor.device)
            self.resume(name, zeros, 0)

    def resume(self, name: str, heard: Tensor, backwards: int) -> None:
        """Let a probe have heard something in so many backwards."""
        probe = self.probes[name]
        probe.tensor.grad = heard
        if probe.kind in STREAMED:
            self._counters[name] = (heard, heard._version - backwards)

    def answers(self, group: dist.ProcessGroup | None) -> dict[str, Answer]:
        """Return what all of them heard, summed over the ranks of a group."""
        return {name: self._answer(name, group) for name in self.probes}

    def _answer(self, name: str, group: dist.ProcessGroup | None) -> Answer:
        probe, backwards = self.probes[name].tensor, self.backwards(name)
        heard = probe.grad
        if heard is None:  # no backward came by; the other ranks may have heard one
            heard = torch.zeros(probe.shape, dtype=probe.dtype, device=probe.device)
        return Answer(sum_over_ranks(heard, group), backwards)

    def backwards(self, name: str) -> int:
        """Return how many backwards a streamed probe has heard; 1 for the others, where it does not matter."""
        if name not in self._counters:
            return 1
        counter, version = self._counters[name]
        heard = self.probes[name].tensor.grad
        return counter._version - version if heard is counter else 2  # create_graph adds into a new tensor

    def heard(self) -> dict[str, tuple[Tensor, int]]:
        """Return what was heard so far, on the CPU, and in how many backwards; for :meth:`resume`."""
        return {
            name: (probe.tensor.grad.cpu(), self.backwards(name))
            for name, probe in self.probes.items()
            if probe.tensor.grad is not None
        }
