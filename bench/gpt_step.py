"""A training step of a GPT, dense and sparse, in turn: ``python -m bench.gpt_step``.

Two networks are the default (``--networks``). ``mini`` is ``gpt-mini`` of the recipes (6 layers of 384 features,
context 128, batches of 16): feed-forward 90 % and attention's projections 70 % sparse. ``wide`` has 768 features and is
90 % sparse everywhere. The others are ``mini`` with a vocabulary of 256 or 32,768 and a head of its own, dense or (with
``-head``) 90 % sparse; of 32,768 tokens the head is most of the step. A step is forward, cross-entropy, backward and
AdamW. SparseLab (single weights) takes part where it is installed, on one thread if it brings an OpenMP runtime of its
own.

One JSON line a contestant; ``vs_dense`` says how many times as fast it is as the dense network.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import sparsekern as sk
from bench.cpu.results import Row, circumstances, rounded, write_rows
from sparsekern.analysis.clock import race
from sparsekern.lab.bench.run import absent, why_one_thread
from sparsekern.lab.models import GPT

CONTEXT, BATCH, HEAD_FEATURES = 128, 16, 64

KINDS = ("mlp", "attention", "head")
"""Kinds of layers, in whose names they are; each has a sparsity."""

DEPTH = 6


class Network(NamedTuple):
    """The sizes of a network, and the sparsity of each of :data:`KINDS`."""

    width: int
    sparsities: tuple[float, float, float]
    vocabulary: int = 256
    free_head: bool = False

    def sparsity_of(self, name: str) -> float:
        """Return the sparsity of a layer; 0 leaves it dense."""
        return next(s for kind, s in zip(KINDS, self.sparsities, strict=True) if kind in name)


NETWORKS = {
    "mini": Network(384, (0.9, 0.7, 0.0)),
    "wide": Network(768, (0.9, 0.9, 0.0)),
    "256": Network(384, (0.9, 0.7, 0.0), free_head=True),
    "256-head": Network(384, (0.9, 0.7, 0.9), free_head=True),
    "32k": Network(384, (0.9, 0.7, 0.0), 32_768, free_head=True),
    "32k-head": Network(384, (0.9, 0.7, 0.9), 32_768, free_head=True),
}


def dense_gpt(network: Network) -> GPT:
    """Return the dense network."""
    torch.manual_seed(0)
    heads = network.width // HEAD_FEATURES
    sizes = {"depth": DEPTH, "heads": heads, "head_features": HEAD_FEATURES, "tied": not network.free_head}
    return GPT(network.vocabulary, CONTEXT, **sizes)


def sparse_gpt(network: Network, block: int) -> GPT:
    """Return the network with sparse layers in blocks of that side."""
    model = dense_gpt(network)
    linear = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    sparsities = {name: s for name in linear if (s := network.sparsity_of(name))}
    sk.sparsify_(model, sparsities, block, targets=list(sparsities))
    return model


def sparselab_gpt(network: Network) -> GPT:
    """Return the network with SparseLab's layers."""
    sparse_linear = import_module("sparselab").SparseLinear
    model = dense_gpt(network)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and (sparsity := network.sparsity_of(name)):
            model.set_submodule(name, sparse_linear(layer.in_features, layer.out_features, sparsity=sparsity))
    return model


def step_of(model: nn.Module, vocabulary: int) -> Callable[[], None]:
    """Return a whole training step on one batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(vocabulary, (BATCH, CONTEXT + 1), generator=generator)

    def step() -> None:
        cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def race_network(name: str, blocks: Sequence[int], threads: int, rounds: int) -> list[Row]:
    """Time the steps of a network, dense and in blocks of each side, on so many threads; return a row a contestant."""
    network = NETWORKS[name]
    models = {"dense": dense_gpt(network)}
    for block in blocks:
        models[f"{block}x{block}"] = sparse_gpt(network, block)
    if absent() is None and (threads == 1 or why_one_thread() is None):
        models["sparselab"] = sparselab_gpt(network)
    calls = {contestant: step_of(model, network.vocabulary) for contestant, model in models.items()}
    timings = race(calls, torch.device("cpu"), rounds, seconds=60)
    dense = timings["dense"].median
    return [
        {
            "network": f"gpt {network.width}x{DEPTH}",
            "vocabulary": network.vocabulary,
            "free_head": network.free_head,
            **{f"{kind}_sparsity": s for kind, s in zip(KINDS, network.sparsities, strict=True)},
            "threads": threads,
            "contestant": contestant,
            "ms": rounded(timing.median),
            "p25": rounded(timing.quantile(0.25)),
            "p75": rounded(timing.quantile(0.75)),
            "samples": len(timing.samples),
            "vs_dense": rounded(dense / timing.median),
        }
        for contestant, timing in timings.items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Race, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/out/gpt_step.jsonl"))
    parser.add_argument("--networks", choices=NETWORKS, nargs="+", default=["mini", "wide"])
    parser.add_argument("--blocks", type=int, nargs="+", default=(1, 16, 32))
    parser.add_argument("--threads", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(argv)
    torch.set_flush_denormal(True)  # as `sparsekern train`
    rows: list[Row] = []
    for name, threads in product(options.networks, options.threads):
        torch.set_num_threads(threads)
        for row in race_network(name, options.blocks, threads, options.rounds):
            print(json.dumps(row), flush=True)
            rows.append({**row, **circumstances()})
    write_rows(options.out, rows)


if __name__ == "__main__":
    sk.keep_freed_memory()
    main()
