"""A set of probes, and the answers that belong to the gradients of an optimizer step."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Variable

from sparsekern.errors import InputError
from sparsekern.nn import BlockSparse
from sparsekern.nn.sharded import is_sharded, whole
from sparsekern.ops import Probe


class Seen(NamedTuple):
    """A gradient after the last backward: the tensor, its version, and whether it was not zero."""

    gradient: weakref.ref[Tensor]
    version: int
    nonzero: Tensor


class ProbeSet:
    """The probes of some layers, by the layers' names, from :meth:`arm` to :meth:`disarm`.

    A probe's answer belongs to the gradient of the layer's values: it accumulates over backwards as the gradient does,
    and is cleared where the gradient was cleared in between (set to None or to zero: by ``zero_grad``, for the second
    pass of SAM, after a bad batch). When the optimizer has made its step, :meth:`keep` stores the answers of that step;
    later answers belong to the next one.

    A tensor does not tell that it was cleared. So hooks compare gradients before and after they accumulate, only while
    probes are armed. They do not synchronise the device. Under ``fully_shard`` the gradient is that of the shards,
    which all ranks compare together; a backward that is not reduced over ranks leaves none, and clears nothing.

    Args:
        layers: sparse layers by name.
    """

    def __init__(self, layers: dict[str, BlockSparse]) -> None:
        self._layers = layers
        self._shards: dict[str, Tensor] = {}  # sharded values, in whose place a layer has gathered ones in a backward
        self.probes: dict[str, Probe] = {}
        self._kept: dict[str, Tensor | None] = {}  # answers of the last step that the optimizer made
        self._left: dict[str, Seen] = {}
        self._looked: dict[str, int] = {}  # the backward that compared last
        self._answered: set[str] = set()  # with answers since the last comparison
        self._unreduced: set[str] = set()  # with answers of backwards that left no gradient
        self._hooks: list[Any] = []

    def arm(self, name: str, probe: Probe) -> None:
        """Give a layer a probe, which it answers from its next forward on."""
        layer = self._layers[name]
        values = layer.values
        if is_sharded(values):
            self._shards[name] = values
        self.probes[name] = layer.probe = probe

        def before(gradient: Tensor) -> None:
            if layer.probe is probe:  # and not in an extra pass without probes
                self._look(name)

        def after(*_: Tensor) -> None:
            if layer.probe is probe:
                self._note(name)

        def answered(answer: Tensor) -> None:
            self._look(name)  # the gradient of the values may come before or after the answer
            self._answered.add(name)
            if is_sharded(values):  # it is the gradient of a gathered copy that autograd computes
                Variable._execution_engine.queue_callback(after)

        if not is_sharded(values):
            self._hooks += [values.register_hook(before), values.register_post_accumulate_grad_hook(after)]
        self._hooks.append(probe.tensor.register_hook(answered))

    def disarm(self) -> None:
        """Remove all probes and hooks, and clear the answers."""
        for name in self.probes:
            self._layers[name].probe = None
        for hook in self._hooks:
            hook.remove()
        self.probes, self._shards, self._kept, self._left, self._looked = {}, {}, {}, {}, {}
        self._answered, self._unreduced, self._hooks = set(), set(), []

    def _look(self, name: str) -> None:
        """Clear answers from before this backward if their gradient was cleared, once a backward."""
        backward = torch._C._current_graph_task_id()
        if self._looked.get(name) != backward:
            self._looked[name] = backward
            self._drop(name)

    def _gradient(self, name: str) -> Tensor | None:
        values: Tensor = self._shards.get(name, self._layers[name].values)
        return values.grad

    def _note(self, name: str) -> None:
        """Record the gradient that a backward has left."""
        gradient = self._gradient(name)
        self._unreduced.discard(name)
        if gradient is not None:
            self._left[name] = Seen(weakref.ref(gradient), gradient._version, _is_nonzero(gradient))
        elif name in self._shards:
            self._unreduced.add(name)

    @torch.no_grad()
    def _drop(self, name: str) -> None:
        heard, gradient = self.probes[name].tensor.grad, self._gradient(name)
        if heard is None:
            return
        if gradient is None:
            if name not in self._unreduced:
                self.probes[name].tensor.grad = None
            return
        left = self._left.get(name)
        same = left is not None and left.gradient() is gradient and left.version == gradient._version
        if same and not is_sharded(gradient):  # whose version does not count every write
            return
        # Something wrote into it: clipping, unscaling, or zero_grad(set_to_none=False).
        dropped = ~_is_nonzero(gradient)
        heard.masked_fill_(dropped if left is None else dropped & left.nonzero, 0)

    def settle(self) -> None:
        """Clear answers whose gradients were cleared since. Call it before and after a step of the optimizer."""
        for name in self._answered:
            self._drop(name)
        self._answered.clear()

    def keep(self) -> list[str]:
        """Store the answers of the step that the optimizer has just made.

        Returns:
            The names of layers whose values had a gradient while their probe had no answer.
        """
        self.settle()
        missed = []
        for name, probe in self.probes.items():
            heard, gradient = probe.tensor.grad, self._gradient(name)
            probe.tensor.grad = None
            self._kept[name] = None if heard is None else heard.detach()
            if heard is None and gradient is not None and bool(_is_nonzero(gradient)):
                missed.append(name)
        return missed

    def answers(self) -> dict[str, Tensor]:
        """Return the answers of the last step that the optimizer made.

        Zeros where there is none: there was no backward on this rank, and others may have an answer.
        """
        asked = {name: probe.tensor for name, probe in self.probes.items()}
        return {name: t.new_zeros(t.shape) if (a := self._kept.get(name)) is None else a for name, t in asked.items()}

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return the answers of the step that is under way and of the last one, on the CPU."""
        heard = {name: probe.tensor.grad for name, probe in self.probes.items()}
        return {
            key: {name: answer.detach().cpu() for name, answer in answers.items() if answer is not None}
            for key, answers in (("heard", heard), ("kept", self._kept))
        }

    @staticmethod
    def check_state(state: dict[str, Any]) -> None:
        """Raise ValueError if a state is malformed, apart from shapes, which :meth:`load_state_dict` checks."""
        for key in ("heard", "kept"):
            if not isinstance(answers := state.get(key), dict):
                raise InputError(f"the state's answers to probes have no {key!r}")
            for name, answer in answers.items():
                if not isinstance(answer, Tensor) or answer.layout != torch.strided or not answer.is_floating_point():
                    raise InputError(f"the state's answer of {name!r} to a probe must be a tensor of real numbers")

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Load the answers of the probes that are armed."""
        for name, probe in self.probes.items():
            heard, kept = (self._loaded(probe.tensor, state[key].get(name)) for key in ("heard", "kept"))
            probe.tensor.grad, self._kept[name] = heard, kept

    def _loaded(self, probe: Tensor, answer: Tensor | None) -> Tensor | None:
        """Return an answer on the probe's device; that of candidates without padding."""
        if answer is None:
            return None
        answer = answer[: probe.shape[0]]
        if answer.shape != probe.shape or answer.dtype != probe.dtype:
            raise InputError(f"the state's answer of a probe has shape {tuple(answer.shape)}, not {tuple(probe.shape)}")
        return answer.to(probe.device, copy=True)


def _is_nonzero(gradient: Tensor) -> Tensor:
    """Return whether any element of a gradient is not zero, on any rank, as a bool ``()``."""
    return whole(gradient.any())
