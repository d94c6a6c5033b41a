"""Lottery tickets: a network is trained, pruned by magnitude and trained again from an early step, in several rounds.

Frankle and Carbin, "The Lottery Ticket Hypothesis", ICLR 2019, arXiv 1803.03635. Rewinding to an early step rather than
to the first one: Frankle et al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis", ICML 2020, 1912.05671.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparsekern.errors import InputError
from sparsekern.nn import BlockSparse
from sparsekern.topology.arguments import check_whole
from sparsekern.training.magnitude import Gradual
from sparsekern.training.optimizer_state import is_one_value, slot_state

VALUES = ""
"""Key of a parameter or a buffer itself, beside the keys of its optimizer state."""


class Lottery(Gradual):
    """Iterative magnitude pruning with rewinding: several rounds of the same training, sparser each time.

    The values of the model, its buffers and the optimizer's state are recorded after step ``rewind`` of the first
    round. At the end of a round :meth:`next_round` frees the weakest blocks, gives their memory back, and puts what is
    left to what was recorded: the next round trains from step ``rewind`` on, and only what is stored. The number of
    blocks falls by the same factor from round to round, from that of the layers as they are built to that of the final
    sparsity::

        tickets = Lottery(model, optimizer, final_sparsity=0.9, rounds=3, rewind=100)
        while True:
            for step in range(tickets.steps, steps):
                loss_fn(model(x), y).backward()
                optimizer.step(); optimizer.zero_grad(set_to_none=True)
            if not tickets.next_round():
                break

    A copy of the model that follows the blocks (:meth:`Method.follow`), such as an average, loses the same ones and
    keeps its values: load the model's state into it where a round begins.

    Args:
        model, optimizer: as for :class:`Method`.
        rounds: number of trainings, 2 or more; the last one is at the final sparsity.
        rewind: steps of the first round after which everything is recorded; 0 for the initial values.
        options: ``final_sparsity`` and ``scope`` of :class:`Gradual`, and arguments of :class:`Method` but for those
            about blocks that move and when.

    Raises:
        TypeError: ``rounds`` or ``rewind`` is not a whole number.
        ValueError: an option is out of range, or what :class:`Gradual` raises with ``compact=True``.
    """

    usual_rounds: ClassVar[int] = 3

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        rounds: int = usual_rounds,
        rewind: int = 0,
        **options: Any,
    ) -> None:
        self.check_options(options, ("compact", "update_every", "start", "stop", "offset"))
        check_whole("rounds", rounds, 2)
        check_whole("rewind", rewind, 0, " steps")
        super().__init__(model, optimizer, compact=True, update_every=1, stop=2, **options)
        self.rounds, self.rewind, self.round = rounds, rewind, 0
        self._model = model
        self._recorded: dict[tuple[str, str], Any] = {}
        if rewind == 0:
            self._record()

    def step(self) -> bool:
        """Return False: blocks go in :meth:`next_round` only."""
        self.check_step()
        return False

    def after_step(self, made: bool) -> None:
        """Count a step that the optimizer made, and record everything where the later rounds begin."""
        super().after_step(made)
        if made and self.round == 0 and self.steps == self.rewind:
            self._record()

    def blocks_left(self, first: int, final: int) -> int:
        """Return how many of ``first`` blocks the present round has, of which the last has ``final``."""
        factor: float = (final / first) ** (self.round / (self.rounds - 1))
        return round(first * factor)

    @torch.no_grad()
    def next_round(self) -> bool:
        """Free the weakest blocks and rewind the others; returns False, and does nothing, after the last round.

        Raises:
            ValueError: the first round did not come to step ``rewind``, or values are not finite; nothing has changed.
        """
        self.check_open()
        if self.round + 1 == self.rounds:
            return False
        if not self._recorded:
            raise InputError(f"rewind is {self.rewind}, but only {self.steps} steps are made", parameter="rewind")
        self.round += 1  # says how many blocks are left
        try:
            self.update()
        except BaseException:
            self.round -= 1
            raise
        state = self.optimizer.state
        for name, tensor in self._tensors():
            tensor.copy_(self._recorded[name, VALUES])
            tensor.grad = None
            kept = {key: entry for (owner, key), entry in self._recorded.items() if owner == name and key != VALUES}
            if isinstance(tensor, nn.Parameter):
                state.pop(tensor, None)
                if kept:
                    state[tensor] = {key: _copied(entry) for key, entry in kept.items()}
        self.steps = self._seen = self.rewind
        self.note_values()
        return True

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what rewinds, by name: all parameters and buffers but the places of blocks."""
        yield from self._model.named_parameters()
        for module_name, module in self._model.named_modules():
            if not isinstance(module, BlockSparse):
                yield from module.named_buffers(module_name, recurse=False)

    def _record(self) -> None:
        for name, tensor in self._tensors():
            self._recorded[name, VALUES] = tensor.detach().clone()
            for key, entry in self.optimizer.state.get(tensor, {}).items():
                self._recorded[name, key] = _copied(entry)

    def compacted(self, kept: Mapping[BlockSparse, Tensor]) -> None:
        """Adapt to layers that kept only some slots."""
        super().compacted(kept)
        names = {id(tensor): name for name, tensor in self._tensors()}
        for layer, slots in kept.items():
            name = names[id(layer.values)]
            keys = {VALUES, *(part.key for part in slot_state(self.optimizer, layer.values, name))}
            for entry in [entry for entry in self._recorded if entry[0] == name and entry[1] in keys]:
                self._recorded[entry] = self._recorded[entry].index_select(0, slots)

    def state_dict(self) -> dict[str, Any]:
        """Return what :meth:`Method.state_dict` returns, the round, and what was recorded."""
        recorded = tuple((name, key, tensor) for (name, key), tensor in self._recorded.items())
        return super().state_dict() | {"round": self.round, "recorded": recorded}

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise what :meth:`load_state_dict` would raise, without loading anything."""
        varies = isinstance(state, dict) and "recorded" in state
        super().check_state({**state, "recorded": self.state_dict()["recorded"]} if varies else state)
        like = dict(self._tensors())
        recorded = state["recorded"]
        good = isinstance(recorded, tuple) and all(self._fits(entry, like) for entry in recorded)
        if not good or (recorded and {name for name, key, _ in recorded if key == VALUES} != like.keys()):
            raise InputError("what was recorded is of other tensors than those of model and optimizer")
        if state["round"] >= self.rounds:
            raise InputError(f"the state is of round {state['round'] + 1}; there are {self.rounds}")
        if state["round"] and not recorded:
            raise InputError(f"the state is of round {state['round'] + 1}, but nothing was recorded to rewind to")

    def _fits(self, entry: Any, like: Mapping[str, Tensor]) -> bool:
        """Return whether an entry of a state is one like the present one, whose optimizer state is loaded."""
        if not (isinstance(entry, tuple) and len(entry) == 3 and entry[0] in like):
            return False
        name, key, tensor = entry
        if not isinstance(tensor, Tensor):
            return key != VALUES and is_one_value(tensor)
        present = self.optimizer.state.get(like[name], {})
        shape = like[name].shape if key == VALUES or key not in present else present[key].shape
        return tensor.layout == torch.strided and (tensor.shape == shape or (key != VALUES and not tensor.dim()))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, after the optimizer's state; see :meth:`Method.load_state_dict`."""
        super().load_state_dict(state)
        self.round = state["round"]
        like = dict(self._tensors())
        self._recorded = {}
        for name, key, entry in state["recorded"]:
            if not isinstance(entry, Tensor):
                self._recorded[name, key] = _copied(entry)
                continue
            present = like[name] if key == VALUES else self.optimizer.state.get(like[name], {}).get(key, entry)
            into = torch.empty_like(present, dtype=entry.dtype, requires_grad=False)  # its device and memory format
            self._recorded[name, key] = into.copy_(entry)


def _copied(entry: Any) -> Any:
    """Return a copy of an entry of an optimizer's state: a tensor, or plain values, also in collections."""
    return entry.detach().clone() if isinstance(entry, Tensor) else copy.deepcopy(entry)
