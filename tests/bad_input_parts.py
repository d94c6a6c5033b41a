"""What the tables of bad input are made of: a case, small layers and models, and some wrong steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import sparsekern as sk
from sparsekern.topology import (
    Grid,
    Topology,
)

NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Case:
    """``call`` must raise exactly ``error``, in one sentence that holds all of ``says``: name, value, rule, way out."""

    name: str
    call: Callable[[], Any]
    error: type[Exception]
    says: tuple[str, ...]


def layer(**options: Any) -> sk.SparseLinear:
    return sk.SparseLinear(32, 32, **{"sparsity": 0.5, "block_size": 8, "seed": 0} | options)


def conv(**options: Any) -> sk.SparseConv2d:
    return sk.SparseConv2d(8, 8, 3, **{"sparsity": 0.5, "block_size": 4, "seed": 0} | options)


def model(**options: Any) -> nn.Module:
    return sk.sparsify_(plain(), **{"sparsity": 0.5, "block_size": 8} | options)


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))


def method(kind: Any = sk.SET, made: nn.Module | None = None, **options: Any) -> Any:
    made = model() if made is None else made
    return kind(made, torch.optim.SGD(made.parameters(), lr=0.1), **options)


def loss(made: nn.Module, value: float = 1.0) -> Tensor:
    return (made(torch.ones(4, 32)) * value).sum()


def place(made: Any, row: list[int], col: list[int]) -> Any:
    """Write places behind the layer's back."""
    made.row[: len(row)] = torch.tensor(row, dtype=torch.int32)
    made.col[: len(col)] = torch.tensor(col, dtype=torch.int32)
    return made


def ints(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def topology(row: Tensor, col: Tensor) -> Topology:
    return Topology(Grid(32, 32, (8, 8)), row, col)


def trained(kind: Any, poison: float, **options: Any) -> None:
    """Take a step whose gradients are not finite, then update."""
    made = model()
    optimizer = torch.optim.SGD(made.parameters(), lr=0.0)
    sparse = kind(made, optimizer, update_every=1, **options)
    for _ in range(3):
        sparse.backward(lambda: loss(made, poison))
        optimizer.step()
        optimizer.zero_grad()
        sparse.step()


def poisoned_values(kind: Any, poison: float) -> None:
    made = model()
    with torch.no_grad():
        made[0].values[0, 0, 0] = poison
    method(kind, made).update()


def state_of(kind: Any, **changes: Any) -> None:
    sparse = method(kind)
    sparse.load_state_dict(sparse.state_dict() | changes)


def without(entry: str) -> None:
    sparse = method()
    state = sparse.state_dict()
    del state[entry]
    sparse.load_state_dict(state)


def loads(made: nn.Module, **changes: Any) -> None:
    state = made.state_dict()
    for key, value in changes.items():
        if value is None:
            del state[key]
        else:
            state[key] = value
    made.load_state_dict(state)


def shared_module() -> nn.Module:
    inner = nn.Linear(32, 32)
    return nn.Sequential(inner, nn.ReLU(), inner)


def shared_weight() -> nn.Module:
    made = plain()
    made[2].weight = made[0].weight
    return made


def optimizer_before() -> None:
    made = plain()
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    sk.sparsify_(made, 0.5, 8)
    sk.SET(made, optimizer)


def moved_away() -> None:
    made = model()
    sparse = method(sk.SET, made)
    sparse.follow(copy.deepcopy(made))
    keys = made[0].topology.keys()
    empty = next(k for k in range(16) if k not in keys.tolist())
    made[0].move_(ints(0).long(), ints(empty // 4), ints(empty % 4))
    sparse.update()


def closure_of(result: Any) -> None:
    method().backward(lambda: result)


def index_for(made: sk.SparseLinear, **changes: Any) -> Tensor:
    parts: dict[str, Any] = {"x": torch.ones(4, 32), "values": made.values, "bias": made.bias, "index": made.index}
    return sk.ops.linear(**parts | {"grid": made.grid} | changes)


def in_backend(name: str) -> Tensor:
    with sk.backend(name):
        return layer(block_size=3)(torch.ones(2, 32))


def case(name: str, call: Callable[[], Any], error: type[Exception], *says: str) -> Case:
    return Case(name, call, error, says)
