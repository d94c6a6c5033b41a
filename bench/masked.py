"""A sparse training step beside that of its masked-dense twin, in turns: ``python -m bench.masked``.

The twin is what most libraries for sparse training do: a dense weight times a mask of zeros and ones in every forward,
so that autograd masks the gradient, too; the optimizer's state is dense. Its blocks are at the same places. The network
is the MLP of ``sparsekern train`` with AdamW: the first and the last layer are dense in all three.

One JSON line a case; ``vs_masked`` says how many times as fast the sparse step is as the twin's, ``vs_dense`` as one of
the dense network.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsekern as sk
from bench.cpu.results import Row, circumstances, rounded, write_rows
from sparsekern.analysis.clock import race
from sparsekern.lab.models import mlp
from sparsekern.topology import to_dense

KEPT_DENSE = ("input", "output")


class MaskedLinear(nn.Linear):
    """A dense layer that computes with ``weight * mask``, and has the values of a sparse one."""

    mask: Tensor

    def __init__(self, layer: sk.SparseLinear) -> None:
        super().__init__(layer.in_features, layer.out_features)
        self.load_state_dict(layer.to_dense().state_dict())
        self.register_buffer("mask", to_dense(layer.topology, torch.ones_like(layer.values)))

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input (weight * mask)' + b``."""
        return F.linear(input, self.weight * self.mask, self.bias)


def networks(width: int, side: int, block: int, sparsity: float) -> dict[str, nn.Module]:
    """Return the MLP for images of that many pixels a side: sparse, masked and dense, with equal values."""

    def dense() -> nn.Sequential:
        torch.manual_seed(0)
        return mlp(10, 1, (side, side), width)

    sparse = sk.sparsify_(dense(), sparsity, block, ignore=KEPT_DENSE, seed=0)
    masked = dense()
    for name, layer in sk.sparse_layers(sparse).items():
        assert isinstance(layer, sk.SparseLinear)
        masked.set_submodule(name, MaskedLinear(layer))
    return {"sparse": sparse, "masked": masked, "dense": dense()}


def step_of(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """Return a whole training step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> None:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main(argv: Sequence[str] | None = None) -> None:
    """Race, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/out/masked.jsonl"))
    parser.add_argument("--widths", type=int, nargs="+", default=(512, 2048))
    parser.add_argument("--blocks", type=int, nargs="+", default=(1, 16))
    parser.add_argument("--sparsities", type=float, nargs="+", default=(0.9, 0.95, 0.98))
    for name, default in (("tokens", 128), ("side", 28), ("rounds", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(argv)
    torch.set_flush_denormal(True)  # as `sparsekern train`: AdamW's moments of masked weights sink below 1e-38
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(options.tokens, 1, options.side, options.side, generator=generator)
    y = torch.randint(10, (options.tokens,), generator=generator)
    about = {**circumstances(), "threads": torch.get_num_threads(), "tokens": options.tokens}
    rows: list[Row] = []
    for width in options.widths:
        for block in options.blocks:
            for sparsity in options.sparsities:
                models = networks(width, options.side, block, sparsity)
                calls = {name: step_of(model, x, y) for name, model in models.items()}
                timings = race(calls, torch.device("cpu"), options.rounds, seconds=4)
                times = {name: timing.median for name, timing in timings.items()}
                row = {"width": width, "block": block, "sparsity": sparsity}
                row |= {f"{name}_ms": rounded(ms) for name, ms in times.items()}
                row |= {f"vs_{name}": rounded(times[name] / times["sparse"]) for name in ("masked", "dense")}
                print(json.dumps(row), flush=True)
                rows.append(about | row)
    write_rows(options.out, rows)


if __name__ == "__main__":
    main()
