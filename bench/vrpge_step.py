"""Whole training steps of VR-PGE beside those of dense networks, in turns: ``python -m bench.vrpge_step``.

A step is all passes, the optimizer, and the step of the probabilities; ``remaining`` is what remains of the sparse
layers, and twice as many blocks are stored as candidates. One JSON line a network and number of threads, with the
median of each contestant and its quartiles:

    vrpge        two forward passes under masks and one backward, every step
    vrpge_every4 the same, with a step of the probabilities in one of four; the mean of four steps
    dense        PyTorch's layers; of linear ones the faster of MKL and oneDNN
    masked       a dense weight times a mask of zeros and ones, whose probabilities learn by the gradient of the mask:
                 the weight's gradient is dense. What the paper compares with.
    masked_pge   VR-PGE on such masks, as its authors' program computes it: a forward and a backward under each of two
                 masks. The step of its probabilities is left out.

``vs_dense`` 4.0 means that a step of ``vrpge`` is four times as fast as the dense one; likewise the others.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.parametrize import register_parametrization

import sparsekern as sk
from bench.cpu.results import Row, circumstances, rounded, write_rows
from sparsekern.analysis.clock import race
from sparsekern.lab.models import mlp, resnet20

EVERY = 4
"""Steps between steps of the probabilities, of the contestant that does not make one each time."""


class OneDnn(torch.autograd.Function):
    """PyTorch's linear layer on oneDNN, forward and backward: faster than MKL on some CPUs."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Return ``x W' + b``."""
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of x, weight and bias."""
        x, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        product = torch.ops.mkldnn._linear_pointwise
        dx = product(dy, weight.T.contiguous(), None, "none", [], "")
        dw = product(dy.T.contiguous(), x.T.contiguous(), None, "none", [], "")
        return dx, dw, dy.sum(0)


class OneDnnLinear(nn.Linear):
    """A linear layer on oneDNN."""

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input W' + b``."""
        return OneDnn.apply(input, self.weight, self.bias)  # type: ignore[no-any-return, no-untyped-call]


class BlockMask(nn.Module):
    """Multiplies a dense weight by a mask of zeros and ones, drawn anew for each forward with equal probabilities.

    The gradient of the mask is taken for that of its probabilities (straight-through).

    Args:
        weight: ``(out, in)`` or ``(out, in, kh, kw)``.
        block: side of the blocks.
        remaining: the first probability of each.
        learns: whether the probabilities have a gradient.
    """

    def __init__(self, weight: Tensor, block: int, remaining: float, learns: bool) -> None:
        super().__init__()
        rows, cols = (-(-size // block) for size in weight.shape[:2])
        self.block = block
        self.probability = nn.Parameter(torch.full((rows, cols, *weight.shape[2:]), remaining), requires_grad=learns)

    def forward(self, weight: Tensor) -> Tensor:
        """Return ``weight * mask``."""
        s = self.probability
        kept = torch.bernoulli(s.detach().clamp(0, 1))  # no budget: a dense product takes as long at any density
        mask = kept + s - s.detach() if s.requires_grad else kept
        whole = mask.repeat_interleave(self.block, 0).repeat_interleave(self.block, 1)
        return weight * whole[: weight.shape[0], : weight.shape[1]]


def linear_stack(*widths: int) -> nn.Sequential:
    """Return linear layers with ReLU between, the last of which is a small head."""
    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class Network(NamedTuple):
    """What is trained: the dense network, its dense layers, the side of the blocks, inputs, and the optimizer."""

    build: Callable[[], nn.Module]
    kept_dense: tuple[str, ...]
    block: int
    shape: tuple[int, ...]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """Return SGD with momentum and weight decay."""
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Return AdamW, the optimizer of the recipe ``mlp``."""
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


NETWORKS = {
    "mlp": Network(lambda: mlp(10, 1, (8, 8), 2048), ("input", "output"), 16, (64, 1, 8, 8), adamw),
    "stack": Network(lambda: linear_stack(1024, 4096, 1024, 10), ("4",), 32, (512, 1024), sgd),
    "resnet20": Network(
        lambda: resnet20(10, 3, width_multiplier=2).to(memory_format=torch.channels_last),
        ("conv1", "fc"),
        16,
        (128, 3, 32, 32),
        sgd,
    ),
}
"""The MLP of the digits, two large linear layers, and ResNet-20 at twice its width."""


def step_of(
    network: Network, x: Tensor, y: Tensor, change: Callable[[nn.Module], object] = lambda _: None, passes: int = 1
) -> Callable[[], None]:
    """Return a whole training step of a dense network.

    Args:
        network, x, y: what is trained, on which batch.
        change: is applied to the dense network first.
        passes: number of forwards and backwards, whose gradients are averaged.
    """
    torch.manual_seed(0)
    model = network.build()
    change(model)
    optimizer = network.optimizer(model)

    def step() -> None:
        for _ in range(passes):
            (cross_entropy(model(x), y) / passes).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def vrpge_step(network: Network, x: Tensor, y: Tensor, remaining: float, every: int) -> Callable[[], None]:
    """Return ``every`` whole training steps of VR-PGE, with one step of the probabilities."""
    torch.manual_seed(0)
    model = sk.sparsify_(
        network.build(), 1 - remaining * sk.VRPGE.pool, network.block, ignore=list(network.kept_dense), seed=0
    )
    optimizer = network.optimizer(model)
    sparse = sk.VRPGE(model, optimizer, sparsity=1 - remaining, structure_every=every)

    def step() -> None:
        for _ in range(every):
            sparse.backward(lambda: cross_entropy(model(x), y))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            sparse.step()

    return step


def sparse_in_vrpge(model: nn.Module, network: Network) -> list[nn.Linear | nn.Conv2d]:
    """Return the linear layers and convolutions of a dense model that VR-PGE computes under masks."""
    return [
        m
        for name, m in model.named_modules()
        if isinstance(m, (nn.Linear, nn.Conv2d)) and name not in network.kept_dense
    ]


def contestants(network: Network, remaining: float) -> dict[str, Callable[[], None]]:
    """Return the steps that take turns, by name."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(network.shape, generator=generator)
    y = torch.randint(10, network.shape[:1], generator=generator)

    def masked(learns: bool) -> Callable[[nn.Module], None]:
        def change(model: nn.Module) -> None:
            for layer in sparse_in_vrpge(model, network):
                mask = BlockMask(layer.weight, network.block, remaining, learns)
                register_parametrization(layer, "weight", mask)

        return change

    def on_onednn(model: nn.Module) -> None:
        for layer in sparse_in_vrpge(model, network):
            layer.__class__ = OneDnnLinear

    found = {
        "vrpge": vrpge_step(network, x, y, remaining, 1),
        "vrpge_every4": vrpge_step(network, x, y, remaining, EVERY),
        "dense": step_of(network, x, y),
        "masked": step_of(network, x, y, masked(True)),
        "masked_pge": step_of(network, x, y, masked(False), passes=2),
    }
    linear = all(isinstance(layer, nn.Linear) for layer in sparse_in_vrpge(network.build(), network))
    if linear and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        found["dense_onednn"] = step_of(network, x, y, on_onednn)
    return found


def measured(network: Network, remaining: float, rounds: int, seconds: float, watch: Callable[[], float]) -> Row:
    """Race the contestants and return their milliseconds and ratios."""
    calls = contestants(network, remaining)
    timings = race(calls, torch.device("cpu"), rounds, seconds, watch)
    row: Row = {}
    median: dict[str, float] = {}
    for name, timing in timings.items():
        steps = EVERY if name == "vrpge_every4" else 1
        low, median[name], high = (timing.quantile(q) / steps for q in (0.25, 0.5, 0.75))
        row |= {f"{name}_ms": rounded(median[name]), f"{name}_p25": rounded(low), f"{name}_p75": rounded(high)}
    best = {name: median[name] for name in ("masked", "masked_pge")}
    best["dense"] = min(median["dense"], median.get("dense_onednn", median["dense"]))
    for mine, suffix in (("vrpge", ""), ("vrpge_every4", "_every4")):
        row |= {f"vs_{name}{suffix}": rounded(ms / median[mine]) for name, ms in sorted(best.items())}
    return row | {"samples": len(timings["vrpge"].samples)}


def main(argv: Sequence[str] | None = None) -> None:
    """Race, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/out/vrpge_step.jsonl"))
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--threads", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--remaining", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=12, help="after which five rounds of a race are enough")
    parser.add_argument("--batch", type=int, help="inputs a step; default: the network's")
    parser.add_argument("--cpu-time", action="store_true", help="processor time, for one thread of a busy machine")
    options = parser.parse_args(argv)
    watch = time.process_time if options.cpu_time else time.perf_counter
    sk.keep_freed_memory()
    torch.set_flush_denormal(True)  # as `sparsekern train`: AdamW's moments of masked weights sink below 1e-38
    before = torch.get_num_threads()
    rows: list[Row] = []
    for name in options.networks:
        network = NETWORKS[name]
        if options.batch is not None:
            network = network._replace(shape=(options.batch, *network.shape[1:]))
        for threads in options.threads:
            torch.set_num_threads(threads)
            about: Row = {"network": name, "threads": threads, "batch": network.shape[0], "block": network.block}
            row = about | {"remaining": options.remaining, "cpu_time": options.cpu_time}
            row |= measured(network, options.remaining, options.rounds, options.seconds, watch)
            print(json.dumps(row), flush=True)
            rows.append(circumstances() | row)
    torch.set_num_threads(before)
    write_rows(options.out, rows)


if __name__ == "__main__":
    main()
