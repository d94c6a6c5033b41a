"""A dense network, trained, becomes sparse and goes on: its strongest blocks stay, and so does the optimizer's state.

python examples/sparse_finetuning.py --epochs 5
"""

from __future__ import annotations

import argparse

import torch
from digits import digits
from torch import nn
from torch.nn import functional as F

import sparsekern as sk


def main(epochs: int = 5, width: int = 512) -> dict[str, float]:
    """Train dense, make sparse, train on, make dense again; return the accuracy after each."""
    (x, y), (test_x, test_y) = digits()
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found: dict[str, float] = {}

    def train(method: sk.Method | None) -> None:
        for _ in range(epochs):
            for part in torch.randperm(len(x)).split(64):
                F.cross_entropy(model(x[part]), y[part]).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                if method is not None:
                    method.step()

    def test(what: str) -> None:
        with torch.no_grad():
            found[what] = (model(test_x).argmax(1) == test_y).float().mean().item()
        stored = sum(parameter.numel() for parameter in model.parameters())
        print(f"{what:22} {found[what]:7.2%} correct, {stored:9,} parameters")

    train(None)
    test("dense")
    sk.sparsify_(model, sparsity=0.9, block_size=16, ignore=["1", "5"], init="norm", optimizer=optimizer)
    test("cut to sparse")
    sparse = sk.RigL(model, optimizer, update_every=10, drop_fraction=0.1, stop=0.75 * epochs * 22)
    train(sparse)
    sparse.close()
    test("trained on sparse")
    sk.densify_(model, optimizer=optimizer)  # absent weights begin at zero
    train(None)
    test("trained on dense again")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    main(**vars(parser.parse_args()))
