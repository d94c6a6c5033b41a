"""The choice between a dense layer and sparse ones by a race, for ``sparsify_(..., only_if_faster=sample)``.

Racing is not known here: :mod:`sparsekern.analysis` registers it, because it stands above the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from sparsekern.nn.block_sparse import BlockSparse


@dataclass(frozen=True)
class Choice:
    """What a race found about one layer; ``print`` it for a sentence.

    Attributes:
        name: the layer's name.
        block: block size of the sparse layer that takes its place; None if the layer stays dense.
        milliseconds: medians of forward and backward of the sparse layers, by block size.
        dense_ms: that of the dense layer.
    """

    name: str
    block: tuple[int, int] | None
    milliseconds: dict[tuple[int, int], float]
    dense_ms: float

    @classmethod
    def of(cls, milliseconds: dict[tuple[int, int], float], dense_ms: float) -> Choice:
        """Return the choice of the fastest, for a layer without a name."""
        fastest = min(milliseconds, key=milliseconds.__getitem__)
        return cls("", fastest if milliseconds[fastest] < dense_ms else None, milliseconds, dense_ms)

    def named(self, name: str) -> Choice:
        """Return the same choice for an equal layer."""
        return replace(self, name=name)

    def __str__(self) -> str:
        if not self.milliseconds:
            return f"{self.name}: stays dense (the sample does not reach it)"
        fastest = min(self.milliseconds, key=self.milliseconds.__getitem__)
        ms, (rows, cols) = self.milliseconds[fastest], fastest
        if self.block is None:
            return f"{self.name}: stays dense ({self.dense_ms:.3g} ms; {rows}x{cols} blocks: {ms:.3g} ms)"
        ratio = self.dense_ms / ms
        return f"{self.name}: {rows}x{cols} blocks, {ratio:.2f}x as fast as dense ({ms:.3g} of {self.dense_ms:.3g} ms)"


Choose = Callable[[str, Sequence[BlockSparse]], Choice]
"""Function of a layer's name and the sparse layers that could take its place, one for each block size."""

Racer = Callable[[nn.Module, Mapping[str, nn.Module], Any], Choose]
"""Function of a model, the layers that could become sparse, and a sample of the model's input."""

_racers: list[Racer] = []


def register_racer(racer: Racer) -> None:
    """Register the function that races layers; the last one is taken."""
    _racers.append(racer)


def racer() -> Racer:
    """Return the registered function that races layers."""
    return _racers[-1]
