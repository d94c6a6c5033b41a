"""Probes that are armed, and what they have heard of the gradients that the optimizer takes."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sparsekern.errors import InputError
from sparsekern.nn import BlockSparse
from sparsekern.ops import Probe
from sparsekern.training.distributed import sum_over_ranks


class Left(NamedTuple):
    """A gradient as the last backward left it: the tensor, its version, and whether there was anything in it."""

    gradient: weakref.ref[Tensor]
    version: int
    anything: Tensor


class ArmedProbes:
    """The probes of some layers, by name, from :meth:`arm` to :meth:`disarm`.

    An answer lives and dies with the gradient of the layer's values. It adds up over backwards as that does, and is
    void where that was dropped in between, set to None or to zero: by ``zero_grad`` of the optimizer or the model, for
    the second pass of SAM, after a bad batch. When the optimizer has made its step, :meth:`keep` takes the answers that
    belong to it; what comes later belongs to the next one.

    No tensor says that it was dropped, so hooks look before and after gradients accumulate, in armed steps only. They
    wait for no device.

    Args:
        layers: by name.
    """

    def __init__(self, layers: dict[str, BlockSparse]) -> None:
        self._layers = layers
        self.probes: dict[str, Probe] = {}
        self._kept: dict[str, Tensor | None] = {}  # of the last step that the optimizer made
        self._left: dict[str, Left] = {}
        self._looked: dict[str, int] = {}  # the backward that looked last
        self._unsettled: set[str] = set()  # heard something since the last look
        self._hooks: list[Any] = []

    def arm(self, name: str, probe: Probe) -> None:
        """Let a layer answer a probe from its next forward on."""
        layer = self._layers[name]
        self.probes[name] = layer.probe = probe

        def before(gradient: Tensor) -> None:
            if layer.probe is probe:  # and not in an extra pass that no probe hears
                self._look(name)

        def after(values: Tensor) -> None:
            gradient = values.grad
            if layer.probe is probe and gradient is not None:
                found = gradient.detach()
                self._left[name] = Left(weakref.ref(gradient), gradient._version, found.any())

        def hear(answer: Tensor) -> None:
            self._look(name)  # the values may come later in this backward, or have come before
            self._unsettled.add(name)

        self._hooks += [
            layer.values.register_hook(before),
            layer.values.register_post_accumulate_grad_hook(after),
            probe.tensor.register_hook(hear),
        ]

    def disarm(self) -> None:
        """Ask nothing any more, and forget what was heard."""
        for name in self.probes:
            self._layers[name].probe = None
        for hook in self._hooks:
            hook.remove()
        self.probes, self._kept, self._left, self._looked = {}, {}, {}, {}
        self._unsettled, self._hooks = set(), []

    def _look(self, name: str) -> None:
        """Drop what was heard before this backward, if its gradient was dropped."""
        backward = torch._C._current_graph_task_id()
        if self._looked.get(name) != backward:
            self._looked[name] = backward
            self._drop(name)

    @torch.no_grad()
    def _drop(self, name: str) -> None:
        heard, gradient = self.probes[name].tensor.grad, self._layers[name].values.grad
        if heard is None:
            return
        if gradient is None:
            self.probes[name].tensor.grad = None
            return
        left = self._left.get(name)
        if left is not None and left.gradient() is gradient and left.version == gradient._version:
            return
        # Something wrote into it: a clipping, an unscaling, or zero_grad(set_to_none=False).
        dropped = ~gradient.any()
        heard.masked_fill_(dropped if left is None else dropped & left.anything, 0)

    def settle(self) -> None:
        """Drop the answers whose gradients were dropped since; before and after a step of the optimizer."""
        for name in self._unsettled:
            self._drop(name)
        self._unsettled.clear()

    def keep(self) -> list[str]:
        """Take the answers that belong to the step that the optimizer has made.

        Returns:
            The layers whose values had a gradient of which no probe heard.
        """
        self.settle()
        deaf = []
        for name, probe in self.probes.items():
            heard, gradient = probe.tensor.grad, self._layers[name].values.grad
            probe.tensor.grad = None
            self._kept[name] = None if heard is None else heard.detach()
            if heard is None and gradient is not None and bool(gradient.any()):
                deaf.append(name)
        return deaf

    def answers(self, group: dist.ProcessGroup | None) -> dict[str, Tensor]:
        """Return what all heard of the last step that the optimizer made, summed over the ranks of a group."""
        return {name: sum_over_ranks(self._answer(name), group) for name in self.probes}

    def _answer(self, name: str) -> Tensor:
        heard, probe = self._kept.get(name), self.probes[name].tensor
        if heard is None:  # no backward came by; the other ranks may have heard one
            return torch.zeros(probe.shape, dtype=probe.dtype, device=probe.device)
        return heard

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return on the CPU what was heard so far of the step that is under way, and what of the last one."""
        heard = {name: probe.tensor.grad for name, probe in self.probes.items()}
        return {
            key: {name: answer.detach().cpu() for name, answer in answers.items() if answer is not None}
            for key, answers in (("heard", heard), ("kept", self._kept))
        }

    @staticmethod
    def check_state(state: dict[str, Any]) -> None:
        """Raise ValueError if a state holds something else than answers; :meth:`load_state_dict` knows their shapes."""
        for key in ("heard", "kept"):
            if not isinstance(answers := state.get(key), dict):
                raise InputError(f"the state's answers to probes have no {key!r}")
            for name, answer in answers.items():
                if not isinstance(answer, Tensor) or answer.layout != torch.strided or not answer.is_floating_point():
                    raise InputError(f"the state's answer of {name!r} to a probe must be a tensor of real numbers")

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Let the probes that are armed have heard what :meth:`state_dict` says."""
        for name, probe in self.probes.items():
            heard, kept = (self._loaded(probe.tensor, state[key].get(name)) for key in ("heard", "kept"))
            probe.tensor.grad, self._kept[name] = heard, kept

    def _loaded(self, probe: Tensor, answer: Tensor | None) -> Tensor | None:
        """Return an answer on the probe's device; that of candidates without what was appended to their number."""
        if answer is None:
            return None
        answer = answer[: probe.shape[0]]
        if answer.shape != probe.shape or answer.dtype != probe.dtype:
            raise InputError(f"the state's answer of a probe has shape {tuple(answer.shape)}, not {tuple(probe.shape)}")
        return answer.to(probe.device, copy=True)
