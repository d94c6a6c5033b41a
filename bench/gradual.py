"""Milliseconds and bytes of a training step along the schedule of gradual pruning: ``python -m bench.gradual``.

An MLP of three layers of one width and AdamW go from no sparsity to the final one. At each update a step (forward,
backward, optimizer) is timed: of the dense network, of the sparse one whose slots stay (``kept``) and of the one whose
slots go at each update (``compact``), which take turns. Bytes are those of parameters, gradients, optimizer state and
index. ``*_update_ms`` is what the update took, with ``compact`` giving the memory back, too. One JSON line an update.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import sparsekern as sk
from sparsekern.analysis.clock import race


def network(width: int) -> nn.Sequential:
    """Return three layers of a width, and a small head."""
    torch.manual_seed(0)
    hidden = [m for _ in range(3) for m in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(width, 10))


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Callable[[], None]:
    """Return a training step, which leaves the gradients in place."""

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return run


def held(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of parameters, gradients, buffers and optimizer state."""
    tensors = [t for p in model.parameters() for t in (p, p.grad, *optimizer.state[p].values())]
    tensors += [b for b in model.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("width", 2048), ("tokens", 256), ("block", 32), ("updates", 8), ("rounds", 9)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--final-sparsity", type=float, default=0.95)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Prune and measure in turns, and print."""
    options = parse(argv)
    x, y = torch.randn(options.tokens, options.width), torch.randint(10, (options.tokens,))
    about: dict[str, Any] = {"device": "cpu", "threads": torch.get_num_threads()} | vars(options)
    trained, methods = {}, {}
    for name in ("dense", "kept", "compact"):
        model = network(options.width)
        if name != "dense":
            sk.sparsify_(model, 0.0, options.block, init="norm", ignore=["6"])  # the same weights
        trained[name] = model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        if name != "dense":
            methods[name] = sk.Gradual(
                *trained[name],
                final_sparsity=options.final_sparsity,
                update_every=1,
                stop=options.updates + 1,
                compact=name == "compact",
            )
    for update in range(options.updates + 1):
        row: dict[str, Any] = {}
        for name, method in methods.items():
            method.steps = update
            step_of(*trained[name], x, y)()  # there is state, and a gradient
            method.steps = update
            began = time.perf_counter()
            method.update()
            row[f"{name}_update_ms"] = round((time.perf_counter() - began) * 1e3, 3)
            row["sparsity"] = round(method.metrics()["sparsity/global"], 4)
        steps = {name: step_of(*both, x, y) for name, both in trained.items()}
        timings = race(steps, x.device, options.rounds, seconds=60)
        for name, both in trained.items():
            row[f"{name}_ms"] = round(timings[name].quantile(0.5), 3)
            row[f"{name}_mib"] = round(held(*both) / 2**20, 2)
        print(json.dumps({**about, "update": update, **row}), flush=True)


if __name__ == "__main__":
    main()
