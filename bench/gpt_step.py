"""A training step of a GPT, dense and sparse, in turn: ``python -m bench.gpt_step``.

There are two networks (``--networks``). ``mini`` is ``gpt-mini`` of the recipes (6 layers of 384 features, context 128,
batches of 16): feed-forward 90 % and attention's projections 70 % sparse. ``wide`` has 768 features and is 90 % sparse
everywhere. A step is forward, cross-entropy, backward and AdamW. SparseLab (single weights) takes part where
it is installed, on one thread if it brings an OpenMP runtime of its own.

One JSON line a contestant; ``vs_dense`` says how many times as fast it is as the dense network.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import product
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import sparsekern as sk
from bench.cpu.results import Row, circumstances, rounded, write_rows
from sparsekern.analysis.clock import race
from sparsekern.lab.bench.run import absent, why_one_thread
from sparsekern.lab.models import GPT

VOCABULARY, CONTEXT, BATCH, HEAD_FEATURES = 256, 128, 16, 64

KINDS = ("mlp", "attention")
"""Names of the layers' parents; each kind has a sparsity."""

DEPTH = 6
NETWORKS = {"mini": (384, (0.9, 0.7)), "wide": (768, (0.9, 0.9))}
"""By name: the features of a network, and its sparsity by kind."""


def dense_gpt(width: int) -> GPT:
    """Return the dense network."""
    torch.manual_seed(0)
    return GPT(VOCABULARY, CONTEXT, depth=DEPTH, heads=width // HEAD_FEATURES, head_features=HEAD_FEATURES)


def sparse_gpt(width: int, sparsities: Sequence[float], block: int) -> GPT:
    """Return the network with sparse layers in blocks of that side; a sparsity for each of :data:`KINDS`."""
    by_kind = {f"*.{kind}.*": sparsity for kind, sparsity in zip(KINDS, sparsities, strict=True)}
    model = dense_gpt(width)
    sk.sparsify_(model, by_kind, block)
    return model


def sparselab_gpt(width: int, sparsities: Sequence[float]) -> GPT:
    """Return the network with SparseLab's layers."""
    sparse_linear = import_module("sparselab").SparseLinear
    model = dense_gpt(width)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear):
            sparsity = next(s for kind, s in zip(KINDS, sparsities, strict=True) if kind in name)
            model.set_submodule(name, sparse_linear(layer.in_features, layer.out_features, sparsity=sparsity))
    return model


def step_of(model: nn.Module) -> Callable[[], None]:
    """Return a whole training step on one batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(VOCABULARY, (BATCH, CONTEXT + 1), generator=generator)

    def step() -> None:
        cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def race_network(
    width: int, sparsities: Sequence[float], blocks: Sequence[int], threads: int, rounds: int
) -> list[Row]:
    """Time the steps of a network, dense and in blocks of each side, on so many threads; return a row a contestant."""
    models = {"dense": dense_gpt(width)}
    for block in blocks:
        models[f"{block}x{block}"] = sparse_gpt(width, sparsities, block)
    if absent() is None and (threads == 1 or why_one_thread() is None):
        models["sparselab"] = sparselab_gpt(width, sparsities)
    calls = {name: step_of(model) for name, model in models.items()}
    timings = race(calls, torch.device("cpu"), rounds, seconds=60)
    dense = timings["dense"].median
    return [
        {
            "network": f"gpt {width}x{DEPTH}",
            "mlp_sparsity": sparsities[0],
            "attention_sparsity": sparsities[1],
            "threads": threads,
            "contestant": name,
            "ms": rounded(timing.median),
            "p25": rounded(timing.quantile(0.25)),
            "p75": rounded(timing.quantile(0.75)),
            "samples": len(timing.samples),
            "vs_dense": rounded(dense / timing.median),
        }
        for name, timing in timings.items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Race, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/out/gpt_step.jsonl"))
    parser.add_argument("--networks", choices=NETWORKS, nargs="+", default=list(NETWORKS))
    parser.add_argument("--blocks", type=int, nargs="+", default=(1, 16, 32))
    parser.add_argument("--threads", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(argv)
    torch.set_flush_denormal(True)  # as `sparsekern train`
    rows: list[Row] = []
    for name, threads in product(options.networks, options.threads):
        torch.set_num_threads(threads)
        for row in race_network(*NETWORKS[name], options.blocks, threads, options.rounds):
            print(json.dumps(row), flush=True)
            rows.append({**row, **circumstances()})
    write_rows(options.out, rows)


if __name__ == "__main__":
    sk.keep_freed_memory()
    main()
