"""Races of layers: a dense layer and sparse ones that could take its place, in turn on the same input.

Importing this module makes ``sparsify_(..., only_if_faster=sample)`` work, which asks :class:`LayerRaces`.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparsekern.analysis.clock import Call, Timing, race
from sparsekern.analysis.profile import arguments, hooked
from sparsekern.nn import BlockSparse, Choice, register_racer
from sparsekern.nn.converters import out_features
from sparsekern.topology import gather_blocks, to_dense

TOLERANCES = {torch.float64: 1e-10, torch.float32: 5e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}
"""The norm of an error, as a fraction of the norm of the exact answer, up to which an answer is right."""

TF32_TOLERANCE = 2e-3
"""The same on CUDA in float32, whose products may be of TensorFloat-32."""

CHECKED = 10**9
"""Multiply-adds of a forward pass up to which a whole input is checked; of a larger one the first rows are."""

CALM = 0.15
"""Distance of the dense layer's quartiles, as a fraction of its median, beyond which the machine is too busy."""

ROUNDS, SECONDS = 20, 0.5
"""Rounds of a race at most, and the time after which five are enough."""


@dataclass(frozen=True)
class LayerInput:
    """What a layer receives in a forward pass.

    Attributes:
        x: the input.
        autocast: the dtype to which the layer's products were cast, or None.
        tokens: number of rows of the output, or of its pixels.
    """

    x: Tensor
    autocast: torch.dtype | None = None
    tokens: int = 0

    @contextlib.contextmanager
    def cast(self) -> Iterator[None]:
        """Autocast as in the forward pass."""
        kind, wanted = self.x.device.type, self.autocast is not None
        with torch.autocast(kind, self.autocast, enabled=wanted) if wanted else contextlib.nullcontext():
            yield


@dataclass(frozen=True)
class Contestant:
    """A layer in a race.

    Attributes:
        forward: function of the input.
        parameters: tensors whose gradients a step computes, beside that of the input.
        exact: function ``(x, dy)`` of float64 tensors that returns what a step returns, computed by dense float64
            products. None if the answers are not checked.
    """

    forward: Callable[[Tensor], Tensor]
    parameters: tuple[Tensor, ...]
    exact: Callable[[Tensor, Tensor], tuple[Tensor, ...]] | None = None

    def forward_call(self, given: LayerInput) -> Call:
        """Return a call of the forward pass alone."""

        def run() -> Tensor:
            with torch.no_grad(), given.cast():
                return self.forward(given.x)

        return run

    def step_call(self, given: LayerInput, dy: Tensor | None = None) -> Callable[[], tuple[Tensor, ...]]:
        """Return a call of forward and backward: it returns the output, its input's gradient and the parameters'.

        Gradients of the layer do not change.

        Args:
            given: the input.
            dy: gradient of the output. Default: :func:`seeded_like` it.
        """
        x = given.x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        if dy is None:
            dy = seeded_like(self.forward_call(given)())  # type: ignore[arg-type]

        def run() -> tuple[Tensor, ...]:
            with torch.enable_grad():
                with given.cast():
                    y = self.forward(x)
                return y.detach(), *torch.autograd.grad(y, (x, *self.parameters), dy)

        return run


def dense_contestant(layer: nn.Module) -> Contestant:
    """Return a dense layer as it is, without its hooks, and with parameters of its own that share its storage."""
    alias = copy.copy(layer)
    alias._parameters = {
        name: None if p is None else nn.Parameter(p.detach(), requires_grad=p.requires_grad)
        for name, p in layer._parameters.items()
    }

    def exact(x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        twin = dense_contestant(copy.deepcopy(alias).double())
        return twin.step_call(LayerInput(x), dy)()

    return Contestant(alias.forward, trained(*alias.parameters()), exact)


def sparse_contestant(layer: BlockSparse) -> Contestant:
    """Return a sparse layer, without its hooks."""

    def exact(x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        topology = replace(layer.topology, grid=replace(layer.grid, transposed=False))
        weight = to_dense(topology, layer.values.detach().double()).requires_grad_()
        twin = copy.copy(layer)
        twin._parameters = {"bias": None if layer.bias is None else nn.Parameter(layer.bias.detach().double())}
        dense = Contestant(lambda x: twin.dense_forward(x, weight), trained(weight, twin.bias))
        y, dx, dweight, *dbias = dense.step_call(LayerInput(x), dy)()
        return y, dx, gather_blocks(topology, dweight), *dbias

    return Contestant(layer.forward, trained(*layer.parameters()), exact)


def trained(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Return those of some tensors that require gradients."""
    return tuple(t for t in tensors if t is not None and t.requires_grad)


def seeded_like(y: Tensor) -> Tensor:
    """Return normally distributed numbers like ``y (...)``, the same at each call."""
    return torch.empty_like(y).normal_(generator=torch.Generator(y.device).manual_seed(0))


def what_is_wrong(contestant: Contestant, given: LayerInput, multiply_adds: int) -> str | None:
    """Compare forward and backward with dense products in float64; return what is wrong in half a sentence, or None.

    Args:
        contestant: with ``exact``.
        given: the input; of a large one the first rows are checked (:data:`CHECKED`).
        multiply_adds: of a dense forward pass on the whole input.
    """
    assert contestant.exact is not None
    rows = max(1, int(len(given.x) * min(1.0, CHECKED / max(1, multiply_adds))))
    part = replace(given, x=given.x[:rows])
    dy = seeded_like(contestant.forward_call(part)())  # type: ignore[arg-type]
    answers = contestant.step_call(part, dy)()
    truth = contestant.exact(part.x.double(), dy.double())
    compute = given.autocast or given.x.dtype
    tolerance = TF32_TOLERANCE if given.x.is_cuda and compute == torch.float32 else TOLERANCES[compute]
    names = ["y", "the gradient of x", *(f"that of parameter {i}" for i in range(len(answers) - 2))]
    for name, answer, right in zip(names, answers, truth, strict=True):
        share = float((answer.double() - right).norm() / right.norm().clamp(min=1e-300))
        if not share <= tolerance:  # NaN is not
            return f"{name} is off by {share:.2g} of its norm"
    return None


def race_steps(
    contestants: Mapping[Any, Contestant], given: LayerInput, rounds: int = ROUNDS, seconds: float = SECONDS
) -> dict[Any, Timing]:
    """Return the timings of forward and backward of contestants that take turns on an input, by the same keys.

    Args:
        contestants: layers by name.
        given: the input of each.
        rounds, seconds: as in :meth:`~sparsekern.analysis.clock.Clock.race`.
    """
    calls = {name: contestant.step_call(given) for name, contestant in contestants.items()}
    return race(calls, given.x.device, rounds, seconds)


def layer_inputs(model: nn.Module, layers: Mapping[str, nn.Module], sample: Any) -> dict[str, LayerInput]:
    """Run a model once, in evaluation mode, and return what each layer received in its last call.

    The statistics of norms and the state of random generators do not change.

    Args:
        model: the model.
        layers: some of its layers by name; those that the sample does not reach are left out of the result.
        sample: a tensor, a tuple of arguments, or a dict of keyword arguments of the model.
    """
    found: dict[str, LayerInput] = {}

    def remember(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            x = (args[0] if args else kwargs["input"]).detach()
            kind = x.device.type
            autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
            found[name] = LayerInput(x, autocast, output.numel() // out_features(module, output))

        return hook

    positional, named = arguments(sample)
    gpus = {parameter.device.index for parameter in model.parameters() if parameter.is_cuda}
    hooks = {layer: remember(name) for name, layer in layers.items()}
    with hooked(model, hooks), torch.no_grad(), torch.random.fork_rng(devices=gpus):
        model(*positional, **named)
    return found


def kind_of(layer: nn.Module, given: LayerInput) -> tuple[Any, ...]:
    """Return what the time of a layer depends on: its class, options, and the layouts of its tensors and its input."""
    x, tensors = given.x, [p for p in layer.parameters(recurse=False)]
    layouts = ((t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for t in tensors)
    return type(layer), layer.extra_repr() or repr(layer), *layouts, x.shape, x.stride(), x.dtype, given.autocast


logger = logging.getLogger("sparsekern")

ALIKE = 0.05
"""Relative difference of the number of blocks up to which layers are equal: allocation rounds it."""


class LayerRaces:
    """Chooses between the layers of a model and the sparse layers that could take their places.

    Building it runs the model once, in evaluation mode. The model is not changed, nor are its gradients, the statistics
    of norms or random generators.

    Args:
        model: the model.
        layers: those of its layers that may become sparse, by name.
        sample: a tensor, a tuple of arguments, or a dict of keyword arguments of the model.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], sample: Any) -> None:
        self._layers = layers
        self._inputs = layer_inputs(model, layers, sample)
        self._known: dict[Any, list[tuple[list[float], Choice]]] = {}

    def __call__(self, name: str, candidates: Sequence[BlockSparse]) -> Choice:
        """Race a layer against sparse layers of several block sizes, unless an equal one has been raced."""
        if name not in self._inputs:
            return Choice(name, None, {}, float("nan"))
        layer, given = self._layers[name], self._inputs[name]
        kind = kind_of(layer, given), *(twin.block_size for twin in candidates)
        densities = [twin.topology.slots / twin.grid.cells for twin in candidates]
        known = self._known.setdefault(kind, [])
        for others, choice in known:
            if all(math.isclose(*pair, rel_tol=ALIKE) for pair in zip(densities, others, strict=True)):
                return choice.named(name)
        contestants: dict[Any, Contestant] = {"dense": dense_contestant(layer)}
        contestants |= {twin.block_size: sparse_contestant(twin) for twin in candidates}
        timings = race_steps(contestants, given)
        dense = timings.pop("dense")
        if dense.spread > CALM:
            text = "%s: the quartiles of the dense layer are %s of its median apart; the machine is too busy to choose"
            logger.warning(text, name, f"{dense.spread:.0%}")
        times = {block: timing.median for block, timing in timings.items()}
        choice = _of_first_rank(Choice.of(times, dense.median))
        known.append((densities, choice))
        return choice.named(name)


def _of_first_rank(choice: Choice) -> Choice:
    """Return the first rank's choice on every rank of a process group: their times differ, their layers must not."""
    if not (dist.is_available() and dist.is_initialized()):
        return choice
    choices = [choice]
    dist.broadcast_object_list(choices, src=0)
    return choices[0]


def time_layer(layer: BlockSparse, given: Tensor | LayerInput, repeats: int = 5) -> tuple[float, float]:
    """Return ``(sparse, dense)`` median milliseconds of forward and backward on an input ``(..., in_features)``.

    The dense contestant is PyTorch's own layer with a weight of zeros, channels last in a convolution. The gradients of
    the layer do not change.

    Args:
        layer: the sparse layer.
        given: an input of the layer.
        repeats: number of measured rounds.
    """
    given = LayerInput(given) if isinstance(given, Tensor) else given
    if given.autocast is None:
        given = replace(given, x=given.x.to(layer.values.dtype))
    shape = replace(layer.grid, transposed=False).weight_shape
    weight = torch.zeros(shape, dtype=layer.values.dtype, device=layer.values.device)
    if weight.dim() == 4:
        weight = weight.contiguous(memory_format=torch.channels_last)
    weight.requires_grad_(layer.values.requires_grad)
    sparse = sparse_contestant(layer)
    dense = Contestant(lambda x: layer.dense_forward(x, weight), trained(weight, layer.bias))
    timings = race_steps({"sparse": sparse, "dense": dense}, given, repeats)
    return timings["sparse"].median, timings["dense"].median


register_racer(LayerRaces)
