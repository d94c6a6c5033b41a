"""Measurement of a machine: one operator after another, in the sizes that its curve needs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.analysis.clock import race
from sparsekern.analysis.plan.machine import OPTIMIZER, OTHER, SPARSE, Machine, Operation, Points
from sparsekern.analysis.plan.trace import Calls, Recorder, Step, trace
from sparsekern.kernels.contract import ConvShape
from sparsekern.nn import SparseConv2d, SparseLinear
from sparsekern.ops.backends import requested_backend, runs_natively
from sparsekern.ops.library import pack

Call = Callable[[], object]
Watch = Callable[[], float]

aten = torch.ops.aten

BLOCKS = (1, 16, 32, 64)
DENSITIES = (0.02, 0.1, 0.3, 0.8)
LINEARS = ((64, 2048), (1024, 768))
"""Tokens and features of sparse layers: few tokens, whose time is that of reading blocks, and many."""

CONV_DENSITIES = (0.05, 0.25, 0.8)
CONVS = ((4, 128), (16, 64))
"""Side of the images and channels of sparse convolutions."""

IMAGES = 32

SIZES = (2**17, 2**21, 2**23)
"""Numbers of an elementwise operator's input."""

ROTATED = 2**24
"""Numbers in the inputs that an elementwise operator takes in turn, so that no cache holds them."""

ROUNDS = 7
"""Calls of an operator that are timed; their median counts."""

SHORT_ROUNDS = 200
"""Steps of a network that computes next to nothing: some tenths of a second, in which a disturbed moment is a few."""


def probes() -> list[Iterator[Call]]:
    """Return groups of calls of one operator each; together they are all that is measured."""
    return [_sparse_linears(), _sparse_convolutions(), _dense_products(), _attentions(), *map(_elementwise, SIZES)]


def measure(about: dict[str, Any], told: Callable[[float], None], watch: Watch) -> Machine:
    """Measure this machine with PyTorch's present number of threads, in about a minute.

    Args:
        about: what :attr:`Machine.about` shall say.
        told: called with the share that is done, from 0 to 1.
        watch: clock, in seconds.
    """
    curves: dict[str, Points] = {}
    groups = probes()
    with torch.no_grad():
        for number, call in ((number, call) for number, group in enumerate(groups) for call in group):
            told(number / len(groups))
            found = recorded(call)
            seconds = race({"": call}, torch.device("cpu"), ROUNDS, watch=watch)[""].median / 1e3
            name, x, amount = point_of(found)
            curves.setdefault(name, []).append((x, seconds / amount))
    plain, sparse = _calls(watch)
    machine = Machine(about, plain, sparse, {name: _merged(points) for name, points in curves.items()})
    factor = _factor(machine, watch)
    told(1.0)
    return replace(machine, curves={name: [(x, factor * y) for x, y in ps] for name, ps in machine.curves.items()})


def point_of(found: Operation) -> tuple[str, float, int]:
    """Return the name of a curve, the place on it, and by what the seconds are divided."""
    if found.group == SPARSE:
        return f"{found.kind}@{found.tokens}", found.intensity, found.elements
    if found.group in (OTHER, OPTIMIZER):
        return found.kind, found.bytes, found.bytes
    return found.kind, found.intensity, found.elements


def recorded(call: Call) -> Operation:
    """Run a call and return its operator, the one that moves most bytes."""
    with Recorder() as recorder:
        call()
    found: Operation = max(recorder.calls, key=lambda each: each.bytes)
    return found


def _merged(points: Points) -> Points:
    """Return a curve in order; points at the same place, such as those of three orders of a product, are averaged."""
    by_x: dict[float, list[float]] = {}
    for x, y in points:
        by_x.setdefault(round(x, 6), []).append(y)
    return sorted((x, sum(ys) / len(ys)) for x, ys in by_x.items())


def _sparse_linears() -> Iterator[Call]:
    ops, backend = torch.ops.sparsekern, requested_backend()
    for block, density, (tokens, features) in itertools.product(BLOCKS, DENSITIES, LINEARS):
        layer = SparseLinear(features, features, sparsity=1 - density, block_size=block, seed=0)
        index, sizes = list(layer.index), [features, features]
        sets = max(1, min(16, ROTATED // layer.values.numel())) if tokens < features else 1
        values = [layer.values.detach().clone() for _ in range(sets)]
        x, dy = ([torch.randn(tokens, features)] * sets for _ in range(2))
        yield rotating(lambda x, v, i=index, s=sizes: ops.linear(x, v, None, i, s, backend), x, values)
        yield rotating(lambda x, dy, v, i=index, s=sizes: ops.linear_backward(dy, x, v, i, s, backend), x, dy, values)


def _sparse_convolutions() -> Iterator[Call]:
    ops, backend = torch.ops.sparsekern, requested_backend()
    for block, density, (side, channels) in itertools.product(BLOCKS, CONV_DENSITIES, CONVS):
        channels = max(channels, 2 * block)
        layer = SparseConv2d(channels, channels, 3, padding=1, sparsity=1 - density, block_size=block, seed=0)
        sizes = pack(ConvShape(channels, channels, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1))
        index, values = list(layer.index), [layer.values.detach()]
        x, dy = ([_images(IMAGES, channels, side)] for _ in range(2))
        yield rotating(lambda x, v, i=index, s=sizes: ops.conv2d(x, v, None, i, s, backend), x, values)
        yield rotating(lambda x, dy, v, i=index, s=sizes: ops.conv2d_backward(dy, x, v, i, s, backend), x, dy, values)


def rotating(call: Callable[..., object], *given: Sequence[Tensor]) -> Call:
    """Return a call that takes the next of some inputs each time."""
    turns = itertools.cycle(list(zip(*given, strict=True)))
    return lambda: call(*next(turns))


def _images(images: int, channels: int, side: int) -> Tensor:
    return torch.randn(images, channels, side, side).contiguous(memory_format=torch.channels_last)


MM = ((1024, 16), (1024, 64), (1024, 256), (1024, 768), (64, 2048))
"""Tokens and features of dense products."""


def _dense_products() -> Iterator[Call]:
    for tokens, features in MM:
        x, dy, w = ([torch.randn(*size)] for size in ((tokens, features), (tokens, features), (features, features)))
        yield rotating(lambda x, w: torch.mm(x, w.t()), x, w)
        yield rotating(torch.mm, dy, w)
        yield rotating(lambda x, dy: torch.mm(dy.t(), x), x, dy)
    for inputs, outputs, side in CONVOLUTIONS:
        x, dy = [_images(IMAGES, inputs, 16)], [_images(IMAGES, outputs, 16)]
        w, rest = [_images(outputs, inputs, side)], ([1, 1], [side // 2] * 2, [1, 1], False, [0, 0], 1)
        yield rotating(lambda x, w, r=rest: aten.convolution(x, w, None, *r), x, w)
        yield rotating(
            lambda x, dy, w, r=rest: aten.convolution_backward(dy, x, w, None, *r, [True, True, False]), x, dy, w
        )


CONVOLUTIONS = ((3, 32, 3), (16, 16, 3), (64, 64, 3), (128, 128, 3), (64, 256, 1))
"""Channels in and out and side of the kernel of dense convolutions."""

CONTEXTS = (64, 128, 256, 1024)


def _attentions() -> Iterator[Call]:
    ops = torch.ops.sparsekern
    forward, backward = (getattr(aten, f"_scaled_dot_product_flash_attention_for_cpu{n}") for n in ("", "_backward"))
    for context, causal in itertools.product(CONTEXTS, (True, False)):
        q, k, v, dy = ([torch.randn(max(1, 4096 // context), context, 4, 64).transpose(1, 2)] for _ in range(4))
        y, sums = forward(q[0], k[0], v[0], 0.0, causal)
        yield rotating(lambda q, k, v, c=causal: forward(q, k, v, 0.0, c), q, k, v)
        yield rotating(lambda *given, c=causal: backward(*given, 0.0, c), dy, q, k, v, [y], [sums])
        qkv, dy = ([torch.randn(max(1, 4096 // context), context, parts * 4 * 64)] for parts in (3, 1))
        if runs_natively(*qkv):
            _, sums = ops.qkv_attention(qkv[0], 4, causal)
            yield rotating(lambda qkv, c=causal: ops.qkv_attention(qkv, 4, c), qkv)
            yield rotating(lambda *given, c=causal: ops.qkv_attention_backward(*given, 4, c), dy, qkv, [sums])


def _elementwise(size: int) -> Iterator[Call]:
    """Yield the operators that are no products on inputs of that many numbers."""
    features = 512
    rows, sets = size // features, max(1, ROTATED // size)

    def inputs(*shape: int) -> list[Tensor]:
        return [torch.randn(*(shape or (rows, features))) for _ in range(min(sets, 8))]

    a, b = inputs(), inputs()
    yield rotating(aten.add, a, b)
    yield rotating(aten.mul, a, b)
    yield rotating(aten.relu, a)
    yield rotating(lambda x, y: aten.threshold_backward(x, y, 0), a, b)
    yield rotating(aten.gelu, a)
    yield rotating(aten.gelu_backward, a, b)
    yield rotating(aten.silu, a)
    yield rotating(aten.silu_backward, a, b)
    yield rotating(lambda x: aten.sum(x, [0]), a)
    yield rotating(lambda x: x.unflatten(1, (8, 64)).transpose(0, 1).contiguous(), a)
    yield lambda: torch.zeros(rows, features)
    w = torch.ones(features)
    means, deviations = torch.zeros(rows, 1), torch.ones(rows, 1)
    yield rotating(lambda x: aten.native_layer_norm(x, [features], w, w, 1e-5), a)
    yield rotating(
        lambda x, y: aten.native_layer_norm_backward(x, y, [features], means, deviations, w, w, [True] * 3), a, b
    )
    yield rotating(lambda x: aten._log_softmax(x, 1, False), a)
    yield rotating(lambda x, y: aten._log_softmax_backward_data(x, y, 1, torch.float32), a, b)
    channels = 64
    images = [_images(max(1, size // channels // 256), channels, 16) for _ in range(2)]
    c, mean = torch.ones(channels), torch.zeros(channels)
    yield lambda: aten.native_batch_norm(images[0], c, mean, None, None, True, 0.1, 1e-5)
    yield lambda: aten.native_batch_norm_backward(
        images[0], images[1], c, None, None, mean, c, True, 1e-5, [True, True, True]
    )
    pooled, places = aten.max_pool2d_with_indices(images[0], [2, 2], [2, 2])
    yield lambda: aten.max_pool2d_with_indices(images[0], [2, 2], [2, 2])
    yield lambda: aten.max_pool2d_with_indices_backward(
        pooled, images[0], [2, 2], [2, 2], [0, 0], [1, 1], False, places
    )
    table, found = torch.randn(256, features), torch.randint(256, (rows,))
    yield lambda: aten.embedding(table, found)
    yield lambda: aten.embedding_dense_backward(a[0], found, 256, -1, False)
    yield from _optimizers(size)


def _optimizers(size: int) -> Iterator[Call]:
    for kind in (torch.optim.AdamW, torch.optim.SGD):
        parameter = nn.Parameter(torch.zeros(size // 4))
        parameter.grad = torch.ones_like(parameter)
        more: dict[str, Any] = {} if kind is torch.optim.AdamW else {"momentum": 0.9}
        optimizer = kind([parameter], lr=1e-9, fused=True, **more)
        optimizer.step()
        yield optimizer.step


def _calls(watch: Watch) -> tuple[float, float]:
    """Return the seconds of a call that computes next to nothing, of any operator and of a sparse product."""

    def network(sparse: bool) -> nn.Module:
        layers: list[nn.Module] = []
        for number in range(8):
            linear = SparseLinear(16, 16, sparsity=0.0, block_size=16, seed=number) if sparse else nn.Linear(16, 16)
            layers += [linear, nn.GELU(), nn.LayerNorm(16)]
        return nn.Sequential(*layers)

    seconds, counts = [], []
    for sparse in (False, True):
        spent, calls = _whole_step(partial(network, sparse), torch.randn(4, 16), SHORT_ROUNDS, watch)
        seconds.append(spent)
        counts.append((sum(calls.values()), sum(n for op, n in calls.items() if op.group == SPARSE)))
    plain = seconds[0] / counts[0][0]
    total, products = counts[1]
    return plain, max(plain, (seconds[1] - (total - products) * plain) / products)


def _factor(machine: Machine, watch: Watch) -> float:
    """Return how much longer the operators of a whole step take than alone, where the caches hold their inputs.

    It is measured on a network of sparse and dense layers; 1 if they take no longer.
    """

    def network() -> nn.Module:
        layers: list[nn.Module] = []
        for number in range(3):
            up, down = (SparseLinear(a, b, sparsity=0.8, seed=number) for a, b in ((512, 1536), (1536, 512)))
            layers += [up, nn.GELU(), down, nn.LayerNorm(512), nn.Linear(512, 512), nn.ReLU()]
        return nn.Sequential(*layers)

    spent, calls = _whole_step(network, torch.randn(1024, 512), 2 * ROUNDS, watch)
    alone = sum(n * machine.seconds(op) for op, n in calls.items())
    idle = sum(n * (machine.sparse_call if op.group == SPARSE else machine.call) for op, n in calls.items())
    return max(1.0, (spent - idle) / (alone - idle))


def _whole_step(network: Callable[[], nn.Module], x: Tensor, rounds: int, watch: Watch) -> tuple[float, Calls]:
    """Return the seconds of a training step of a network, and the operators that it calls."""

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = model(x)
        return y.square().mean()

    def adamw(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), fused=True)

    model = network()
    optimizer = adamw(model)

    def step() -> None:
        loss(model, x).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with torch.enable_grad():
        seconds = race({"": step}, torch.device("cpu"), rounds, watch=watch)[""].median / 1e3
        with torch.device("meta"):
            traced = trace(Step(network(), x, loss, adamw, clip_norm=1.0))
    return seconds, traced.forward + traced.backward + traced.update
