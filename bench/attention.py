"""Attention of queries, keys and values in one tensor beside PyTorch's, in turns: ``python -m bench.attention``.

Causal, float32, heads of 64 features; forward and backward each by itself. What PyTorch needs around its function, the
views of ``qkv`` and the stacking of the three gradients, is part of its time. One JSON line a case and number of
threads, milliseconds by the wall clock; ``vs_pytorch`` 1.5 means that both passes take PyTorch 1.5 times as long.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench.cpu.results import Row, circumstances, rounded, write_rows
from sparsekern import keep_freed_memory
from sparsekern.analysis.clock import race
from sparsekern.nn import qkv_attention

FEATURES = 64
CASES = ((16, 128, 6), (64, 64, 6), (16, 256, 6), (2, 1024, 12), (1, 4096, 1), (1, 4096, 3))
"""Batch, tokens and heads."""


def pytorch(qkv: Tensor, heads: int) -> Tensor:
    """Compute what ``qkv_attention`` computes."""
    q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def compare(batch: int, tokens: int, heads: int, rounds: int) -> Row:
    """Return the times of a case."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(batch, tokens, 3 * heads * FEATURES, generator=generator).requires_grad_()
    dy = torch.randn(batch, tokens, heads * FEATURES, generator=generator)
    functions = {"pytorch": partial(pytorch, heads=heads), "ours": partial(qkv_attention, heads=heads, is_causal=True)}
    calls: dict[str, Callable[[], object]] = {}
    for name, function in functions.items():
        calls[f"{name}_forward"] = partial(function, qkv)
        calls[f"{name}_backward"] = partial(torch.autograd.grad, function(qkv), qkv, dy, retain_graph=True)
    times = {name: t.median for name, t in race(calls, torch.device("cpu"), rounds, seconds=3).items()}
    theirs, ours = (times[f"{name}_forward"] + times[f"{name}_backward"] for name in functions)
    row: Row = {"batch": batch, "tokens": tokens, "heads": heads, "threads": torch.get_num_threads()}
    return row | {f"{name}_ms": rounded(ms) for name, ms in times.items()} | {"vs_pytorch": rounded(theirs / ours)}


def main(argv: Sequence[str] | None = None) -> None:
    """Race, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/out/attention.jsonl"))
    parser.add_argument("--threads", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--most-tokens", type=int, default=4096, help="leave out longer contexts")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(argv)
    keep_freed_memory()
    about, rows = circumstances(), []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for case in CASES:
            if case[1] <= options.most_tokens:
                rows.append(about | compare(*case, options.rounds))
                print(json.dumps(rows[-1]), flush=True)
    write_rows(options.out, rows)


if __name__ == "__main__":
    main()
