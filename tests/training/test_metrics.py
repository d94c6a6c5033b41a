"""What a method tells, by hand on a grid of 4 x 4."""

from __future__ import annotations

import torch

import sparsekern as sk
from sparsekern.topology import Grid, from_mask
from sparsekern.training.followers import Move
from sparsekern.training.metrics import Books

MASK = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]])


def ints(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def make() -> tuple[sk.SparseLinear, Books]:
    layer = sk.SparseLinear(8, 8, topology=from_mask(Grid(8, 8, (2, 2)), MASK), capacity=5)
    return layer, Books({"fc": layer}, seed=0)


def move(layer: sk.SparseLinear, books: Books, move: Move) -> None:
    layer.move_(*move)
    books.note("fc", move)


def test_by_hand():
    layer, books = make()
    assert books.metrics() == {
        "sparsity/fc": 0.75,
        "churn/fc": 0.0,
        "itop/fc": 0.25,
        "kept/fc": 1.0,
        "sparsity/global": 0.75,
        "itop/global": 0.25,
    }
    move(layer, books, Move(torch.tensor([0, 2]), ints(3, 3), ints(0, 1)))  # two of four, to places never in use
    metrics = books.metrics()
    assert (metrics["churn/fc"], metrics["itop/fc"], metrics["kept/fc"]) == (0.5, 6 / 16, 0.5)
    books.open()
    move(layer, books, Move(torch.tensor([0, 1]), ints(0, -1), ints(0, -1)))  # one comes back, one is freed
    metrics = books.metrics()
    assert (metrics["churn/fc"], metrics["itop/fc"], metrics["kept/fc"]) == (2 / 3, 6 / 16, 0.5)
    assert metrics["sparsity/fc"] == 13 / 16
    books.open()
    assert books.churn == {"fc": 0.0}


def test_another_goes_on_where_the_state_was_taken():
    layer, books = make()
    move(layer, books, Move(torch.tensor([3]), ints(3), ints(3)))
    other = Books({"fc": layer}, seed=0)
    other.load_state_dict(books.state_dict())
    assert other.metrics() == books.metrics() and other.metrics()["kept/fc"] == 0.75
