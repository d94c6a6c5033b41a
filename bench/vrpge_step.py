"""Whole training steps of VR-PGE beside those of the dense network, in turns: ``python -m bench.vrpge_step``.

An MLP of three sparse layers of one width, SGD with momentum. ``ratio`` is what remains of the dense weight; ``pool``
how many candidates are stored for one that remains. A step is all passes, the optimizer, and the step on the
probabilities. One JSON line a row; ``speedup`` is against the faster of PyTorch's two dense matrix products.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import sparsekern as sk
from sparsekern.analysis.clock import Call, Clock


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


def network(width: int, layer: Callable[[int, int], nn.Module]) -> nn.Sequential:
    """Return three hidden layers and a small dense head."""
    torch.manual_seed(0)
    hidden = [m for _ in range(3) for m in (layer(width, width), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(width, 10))


def step_of(model: nn.Module, x: Tensor, y: Tensor, method: Callable[..., sk.Method] | None) -> Callable[[], None]:
    """Return a whole training step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    sparse = None if method is None else method(model, optimizer)

    def step() -> None:
        if sparse is None:
            nn.functional.cross_entropy(model(x), y).backward()
        else:
            sparse.backward(lambda: nn.functional.cross_entropy(model(x), y))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if sparse is not None:
            sparse.step()

    return step


def main(argv: Sequence[str] | None = None) -> None:
    """Race and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("width", 1024), ("tokens", 512), ("rounds", 15), ("block", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(argv)
    width, tokens, block = options.width, options.tokens, options.block
    x, y = torch.randn(tokens, width), torch.randint(10, (tokens,))

    def sparse(ratio: float, pool: float, **more: object) -> Callable[[], None]:
        model = network(width, nn.Linear)
        stored = 1 - ratio * pool
        sk.sparsify_(model, stored, block, ignore=["6"], seed=0)
        return step_of(model, x, y, lambda m, o: sk.VRPGE(m, o, sparsity=1 - ratio, **more))

    rows: dict[tuple[float, float, str], Callable[[], None]] = {}
    for ratio, pool in ((0.1, 2.0), (0.1, 10.0), (0.25, 2.0), (0.25, 4.0), (0.5, 2.0)):
        rows[ratio, pool, "every step"] = sparse(ratio, pool)
        rows[ratio, pool, "every 4 steps"] = sparse(ratio, pool, structure_every=4)
    dense = {
        "MKL": step_of(network(width, nn.Linear), x, y, None),
        "oneDNN": step_of(network(width, OneDnnLinear), x, y, None),
    }
    calls: dict[str, Call] = {**dense, **{json.dumps(key): call for key, call in rows.items()}}
    timings, errors = Clock(torch.device("cpu")).race(calls, options.rounds, seconds=60)
    times = {name: timing.median for name, timing in timings.items()}
    best = min(times[name] for name in dense if name in times)
    about = {"device": "cpu", "threads": torch.get_num_threads(), "width": width, "tokens": tokens}
    for name in dense:
        ms = {"ms": round(times[name], 2)} if name in times else {"error": str(errors[name])}
        print(json.dumps({**about, "network": f"dense {name}", **ms}))
    for ratio, pool, structure in rows:
        ms = times[json.dumps((ratio, pool, structure))]
        row = {"network": "vrpge", "block": block, "ratio": ratio, "pool": pool, "structure": structure}
        print(json.dumps({**about, **row, "ms": round(ms, 2), "speedup": round(best / ms, 2)}))


if __name__ == "__main__":
    main()
