"""What a method tells about the places of its blocks: how many moved, how many were ever in use."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from sparsekern.nn import BlockSparse
from sparsekern.topology import are_absent, stored_blocks
from sparsekern.training.coverage import Coverage
from sparsekern.training.followers import Move


class Books:
    """Kept move by move, from the first topology on.

    Args:
        layers: by name.
        seed: decides which places of a large grid are watched.

    Attributes:
        start: the sorted keys ``row * C + col`` of each layer's first topology, on the CPU.
    """

    def __init__(self, layers: dict[str, BlockSparse], seed: int) -> None:
        self._layers = layers
        self.start: dict[str, Tensor] = {n: layer.topology.sorted_keys().cpu() for n, layer in layers.items()}
        self._coverage = {name: Coverage(layer.topology, seed, name) for name, layer in layers.items()}
        self.open()

    def open(self) -> None:
        """Begin an update."""
        self.churn = dict.fromkeys(self._layers, 0.0)
        """The fraction of each layer's blocks that the update moves."""

    def note(self, name: str, move: Move) -> None:
        """Enter a move that was made."""
        layer = self._layers[name]
        self.churn[name] = move.slots.numel() / max(1, stored_blocks(layer.index))
        self._coverage[name].add(move.row * layer.grid.cols + move.col)

    def metrics(self) -> dict[str, float]:
        """Return the numbers that :meth:`sparsekern.training.Method.metrics` names; waits for the device."""
        numbers: dict[str, float] = {}
        stored, total, explored = 0, 0, 0.0
        for name, layer in self._layers.items():
            elements = layer.topology.elements()
            stored, total = stored + elements, total + layer.grid.numel
            numbers[f"sparsity/{name}"] = 1 - elements / layer.grid.numel
            numbers[f"churn/{name}"] = self.churn[name]
            rate = numbers[f"itop/{name}"] = self._coverage[name].rate()
            explored += rate * layer.grid.numel
            now = layer.topology.sorted_keys().cpu()
            start = self.start[name]
            kept = int((~are_absent(start, now, layer.grid.cells)).count_nonzero())
            numbers[f"kept/{name}"] = kept / max(1, start.shape[0])
        numbers["sparsity/global"] = 1 - stored / total
        numbers["itop/global"] = explored / total
        return numbers

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {
            "churn": dict(self.churn),
            "start": {name: self._padded(name) for name in self._layers},
            "explored": {name: coverage.seen.clone() for name, coverage in self._coverage.items()},
        }

    def _padded(self, name: str) -> Tensor:
        """Return the keys of the first topology, and -1 for each slot that was free."""
        start = self.start[name]
        return pad(start, (0, self._layers[name].topology.slots - start.shape[0]), value=-1)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken."""
        self.churn = dict(state["churn"])
        self.start = {name: keys[keys >= 0].clone() for name, keys in state["start"].items()}
        for name, seen in state["explored"].items():
            self._coverage[name].seen.copy_(seen)
