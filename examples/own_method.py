"""A method of one's own: the weakest blocks move next to the strongest, in the same block row.

python examples/own_method.py --steps 300
"""

from __future__ import annotations

import argparse

import torch
from digits import digits
from torch import nn
from torch.nn import functional as F

import sparsekern as sk
from sparsekern.nn import BlockSparse
from sparsekern.training import Move


class Neighbours(sk.Method):
    """Moves the weakest blocks of a layer to the nearest empty place on the right of its strongest ones.

    All that a method has to say is which slots go where: the base class counts steps, moves the optimizer's state,
    saves and resumes, and keeps ranks together.
    """

    def choose(self, name: str, layer: BlockSparse, fraction: float, generator: torch.Generator) -> Move | None:
        columns = layer.grid.cols
        order = self.strength(name, layer).argsort()
        many = int(fraction * len(order))
        taken = set((layer.row * columns + layer.col).tolist())
        moves: list[tuple[int, int, int]] = []
        for weak, strong in zip(order[:many].tolist(), order.flip(0)[:many].tolist(), strict=True):
            row, col = int(layer.row[strong]), int(layer.col[strong])
            free = [c for c in range(col + 1, columns) if row * columns + c not in taken]
            if free:
                taken.add(row * columns + free[0])
                moves.append((weak, row, free[0]))
        if not moves:
            return None
        slots, rows, cols = torch.tensor(moves, dtype=torch.int32).T
        return Move(slots, rows, cols)


def main(steps: int = 300, width: int = 512) -> float:
    """Train and print; return the accuracy on the test images."""
    (x, y), (test_x, test_y) = digits()
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )
    sk.sparsify_(model, sparsity=0.9, block_size=16, ignore=["1", "5"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sparse = Neighbours(model, optimizer, update_every=20, stop=0.75 * steps)
    for _ in range(steps):
        part = torch.randint(len(x), (64,))
        F.cross_entropy(model(x[part]), y[part]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        sparse.step()
    with torch.no_grad():
        correct = (model(test_x).argmax(1) == test_y).float().mean().item()
    print(f"{correct:.2%} correct; {sparse.metrics()['itop/global']:.0%} of all places were ever in use")
    return correct


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    main(**vars(parser.parse_args()))
