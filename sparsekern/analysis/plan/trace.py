"""A training step without data: which operators it calls on what sizes, and the bytes that live at its peak.

The step runs on fake tensors (:class:`torch._subclasses.fake_tensor.FakeTensorMode`), which have sizes and no memory:
a model of 70 billion parameters is traced in seconds. They pose as tensors of a CPU, so that PyTorch chooses the
operators that a real step calls, such as the attention that stores no matrix of scores.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import clip_grad_norm_
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

from sparsekern.analysis.plan.machine import Operation, operation
from sparsekern.analysis.summary import state_bytes
from sparsekern.nn import sparse_layers
from sparsekern.topology import index_bytes

Calls = Counter[Operation]
"""How often each operation is called."""


@dataclass(frozen=True)
class Step:
    """What is to be traced.

    Attributes:
        model: on the meta device; it is not changed.
        inputs: the batch of one pass, in any structure; only shapes and dtypes of its tensors count.
        loss: called with the model and the inputs, returns a scalar.
        optimizer: called with the model, returns its optimizer.
        clip_norm: to which the gradients are clipped, or None.
        autocast: dtype of the products, or None for that of the parameters.
    """

    model: nn.Module
    inputs: Any
    loss: Callable[[nn.Module, Any], Tensor]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    clip_norm: float | None = None
    autocast: torch.dtype | None = None


@dataclass(frozen=True)
class Parameter:
    """One parameter of a traced model.

    Attributes:
        name: of the first module that has it.
        rows: size of its first axis, along which FSDP2 shards it.
        bytes, gradient, state: of the parameter, its gradient and what the optimizer keeps for it.
        slots: slots of a sparse layer's values; 0 for others.
        block: elements of a block of a sparse layer.
        cells: places for a block in the layer's grid.
    """

    name: str
    rows: int
    bytes: int
    gradient: int
    state: int
    slots: int = 0
    block: int = 1
    cells: int = 0


@dataclass(frozen=True)
class Trace:
    """What a step calls and holds.

    Attributes:
        forward, backward: operations of a pass over one batch.
        update: operations of clipping and of the optimizer.
        parameters: the model's, each once.
        index: bytes of where the blocks are, in all sparse layers.
        buffers: bytes of other buffers, such as running statistics.
        saved: bytes alive at the end of the forward, which the backward needs.
        peaks: pairs of bytes alive at once in the step, of gradients and of all else, none below another in both.
    """

    forward: Calls
    backward: Calls
    update: Calls
    parameters: tuple[Parameter, ...]
    index: int
    buffers: int
    saved: int
    peaks: tuple[tuple[int, int], ...]

    @property
    def flops(self) -> int:
        """Floating point operations of the products of a forward and backward; a slot counts as a whole block."""
        return sum(op.flops * n for calls in (self.forward, self.backward) for op, n in calls.items())

    def peak(self, kept: float = 1.0, accumulated: bool = False) -> int:
        """Return the largest number of bytes alive above those that are there between two steps.

        Args:
            kept: the part of the gradients that stays on a device.
            accumulated: whether the gradients of an earlier pass are there throughout.
        """
        all_along = sum(parameter.gradient for parameter in self.parameters) if accumulated else 0
        return max(other + math.ceil(kept * max(all_along, held)) for held, other in self.peaks)


def trace(step: Step, checkpointed: Sequence[str] = ()) -> Trace:
    """Trace a training step.

    Args:
        step: the model and what is done with it.
        checkpointed: names of modules that store their inputs only and run again in the backward.
    """
    model = copy.deepcopy(step.model).train()
    with FakeTensorMode():
        _fake_(model)
        for name in checkpointed:
            module: Any = model.get_submodule(name)
            module.forward = partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)
        inputs = tree_map_only(Tensor, _fake, step.inputs)
        optimizer = step.optimizer(model)
        _begin(model, optimizer)
        parameters = tuple(_parameters(model, optimizer))
        recorder = Recorder()
        for tensor in tree_leaves((inputs, [*model.parameters(), *model.buffers()])):
            recorder.ignore(tensor)
            if tensor.requires_grad:
                tensor.register_post_accumulate_grad_hook(recorder.keep)
        with recorder:
            with torch.autocast("cpu", step.autocast, enabled=step.autocast is not None):
                loss = step.loss(model, inputs)
            saved = recorder.gradients + recorder.others
            forward, recorder.calls = recorder.calls, Counter()
            loss.backward()
            del loss
            backward, recorder.calls = recorder.calls, Counter()
            if step.clip_norm is not None:
                clip_grad_norm_(model.parameters(), step.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    index = sum(index_bytes(layer.grid, layer.topology.slots) for layer in sparse_layers(model).values())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers()) - index
    return Trace(forward, backward, recorder.calls, parameters, index, buffers, saved, tuple(recorder.peaks))


def repeated_blocks(model: nn.Module) -> list[str]:
    """Return the names of the modules worth checkpointing: those of the class that is repeated most.

    These are the layers of a transformer or the residual blocks of a convolutional network; none if nothing repeats.
    """
    by_class: dict[type[nn.Module], list[str]] = {}
    taken: list[str] = []
    for name, parent in model.named_modules():  # parents come before their children
        if any(name.startswith(f"{outer}.") or name == outer for outer in taken):
            continue
        children: dict[type[nn.Module], list[str]] = {}
        for child, module in parent.named_children():
            if not isinstance(module, (nn.Sequential, nn.ModuleList)) and len(list(module.modules())) > 2:
                children.setdefault(type(module), []).append(f"{name}.{child}".lstrip("."))
        for kind, row in children.items():
            if len(row) > 1:
                by_class.setdefault(kind, []).extend(row)
                taken += row
    return max(by_class.values(), key=len, default=[])


def _fake(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


def _fake_(model: nn.Module) -> None:
    """Replace parameters and buffers by fake ones; what was shared stays shared."""
    made: dict[Tensor, Tensor] = {}

    def twin(tensor: Any) -> Any:
        if tensor is None:
            return None
        if tensor not in made:
            new = _fake(tensor)
            parameter = isinstance(tensor, nn.Parameter)
            made[tensor] = nn.Parameter(new, requires_grad=tensor.requires_grad) if parameter else new
        return made[tensor]

    for module in model.modules():
        module._parameters.update({name: twin(tensor) for name, tensor in module._parameters.items()})
        module._buffers.update({name: twin(tensor) for name, tensor in module._buffers.items()})


def _parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Parameter]:
    layers = {id(layer.values): layer for layer in sparse_layers(model).values()}
    for name, parameter in model.named_parameters():
        size = parameter.numel() * parameter.element_size()
        layer = layers.get(id(parameter))
        sparse = {} if layer is None else {"slots": parameter.shape[0], "cells": layer.grid.cells}
        block = 1 if layer is None else math.prod(parameter.shape[1:])
        rows = parameter.shape[0] if parameter.dim() else 1
        gradient = size if parameter.requires_grad else 0
        yield Parameter(name, rows, size, gradient, state_bytes(optimizer, parameter), block=block, **sparse)


def _begin(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Take a step, after which the optimizer has its state."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@dataclass
class _Held:
    """A piece of memory that was allocated in the step."""

    bytes: int
    is_gradient: bool = False


@dataclass
class Recorder(TorchDispatchMode):
    """Records the operators that run, and the memory that they allocate and free."""

    calls: Calls = field(default_factory=Counter)
    peaks: list[tuple[int, int]] = field(default_factory=lambda: [(0, 0)])
    gradients: int = 0
    others: int = 0

    def __post_init__(self) -> None:
        super().__init__()
        self._held: weakref.WeakKeyDictionary[Any, _Held] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.calls.update(operation(func, args, kwargs, result))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._allocated(tensor.untyped_storage())
        return result

    def ignore(self, tensor: Tensor) -> None:
        """Count nothing for a tensor that was there before the step, nor for views of it."""
        self._held[tensor.untyped_storage()] = _Held(0)

    def keep(self, parameter: Tensor) -> None:
        """Count the memory of a gradient as such from now on."""
        assert parameter.grad is not None
        held = self._held[parameter.grad.untyped_storage()]
        if not held.is_gradient:
            held.is_gradient = True
            self.gradients += held.bytes
            self.others -= held.bytes

    def _allocated(self, storage: Any) -> None:
        if storage in self._held:
            return
        held = self._held[storage] = _Held(storage.nbytes())
        weakref.finalize(storage, self._freed, held)
        self.others += held.bytes
        now = self.gradients, self.others
        if not any(g >= now[0] and o >= now[1] for g, o in self.peaks):
            self.peaks = [(g, o) for g, o in self.peaks if g > now[0] or o > now[1]] + [now]

    def _freed(self, held: _Held) -> None:
        if held.is_gradient:
            self.gradients -= held.bytes
        else:
            self.others -= held.bytes
