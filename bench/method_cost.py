"""What updates of the topology cost, in parts of the training time: ``python -m bench.method_cost``.

One sparse layer, trained with momentum SGD (forward, both gradients, optimizer). A contestant makes the steps that an
update needs, probe armed, and the update; beside it the same step without a method. ``percent`` is what the update
adds, over ``update_every`` plain steps. The drop fraction stays at its highest; the cosine halves it on average. One
JSON line a row. ``bound`` of RigL is ``(1 - d) / (3 d T)``: it scores every absent block, density d, interval T.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch

import sparsekern as sk
from sparsekern.analysis.clock import race

METHODS: dict[str, tuple[type[sk.Method], dict[str, Any]]] = {
    "SET": (sk.SET, {}),
    "RigL": (sk.RigL, {"allow_dense_scores": True}),
    "RigL, 64 tokens": (sk.RigL, {"allow_dense_scores": True, "score_tokens": 64}),
    "RigL, screened": (sk.RigL, {"allow_dense_scores": True, "scoring": "screen"}),
    "GSE": (sk.GSE, {}),
    "GSE, global, with replacement": (sk.GSE, {"scope": "global", "with_replacement": True}),
    "GraBo": (sk.GSE, {"distribution": "grabo"}),
    "GraEst": (sk.GSE, {"distribution": "graest"}),
}


Cycle = tuple[Callable[[], None], int, sk.Method | None]


def cycle(method: str | None, block: int, options: argparse.Namespace) -> Cycle:
    """Return the steps of one update, how many these are, and the method; of no method one plain step."""
    layer = sk.SparseLinear(options.inputs, options.outputs, sparsity=options.sparsity, block_size=block, seed=0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-6, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(options.tokens, options.inputs, generator=generator, requires_grad=True)
    dy = torch.randn(options.tokens, options.outputs, generator=generator)
    sparse, steps = None, 1
    if method is not None:
        kind, more = METHODS[method]
        sparse = kind(layer, optimizer, update_every=1, drop_fraction=options.drop, **more)
        steps = sparse.stages() if isinstance(sparse, sk.training.GradientMethod) else 1

    def run() -> None:
        for _ in range(steps):
            layer(x).backward(dy)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            x.grad = None
            if sparse is not None:
                sparse.step()

    return run, steps, sparse


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    sizes = (("tokens", 512), ("inputs", 1024), ("outputs", 4096), ("update-every", 100), ("rounds", 15))
    for name, default in sizes:
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--drop", type=float, default=0.3)
    parser.add_argument("--blocks", type=int, nargs="+", default=[32, 1])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Race and print."""
    options = parse(argv)
    for block in options.blocks:
        cycles = {name: cycle(name, block, options) for name in options.methods}
        plain = cycle(None, block, options)
        calls = {"": plain[0], **{name: run for name, (run, _, _) in cycles.items()}}
        timings = race(calls, torch.device("cpu"), options.rounds, seconds=60)
        step = timings[""].median
        names = ("tokens", "inputs", "outputs", "sparsity", "drop", "update_every")
        about = {name: getattr(options, name) for name in names}
        about = {
            "device": "cpu",
            "threads": torch.get_num_threads(),
            **about,
            "block": block,
            "step_ms": round(step, 3),
        }
        for name, (_, steps, _) in cycles.items():
            extra = timings[name].median - steps * step
            row = {**about, "method": name, "update_ms": round(extra, 3)}
            row["percent"] = round(100 * extra / (options.update_every * step), 3)
            if METHODS[name][0] is sk.RigL:
                row["bound"] = round(100 * options.sparsity / (3 * (1 - options.sparsity) * options.update_every), 3)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
