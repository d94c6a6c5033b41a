"""The small models, batches and steps of the tests of AGENT."""

from __future__ import annotations

import torch
from torch import nn

import sparsekern as sk

F64 = torch.float64
METHODS = [sk.SET, sk.RigL, sk.GSE]
ESTIMATES = [{}, {"estimate": "gradients"}, {"estimate": "gradients", "scope": "layer"}]


def make(*, norm: bool = False, dropout: float = 0.0, dtype=torch.float32, block: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    extra = [nn.BatchNorm1d(16)] if norm else []
    extra += [nn.Dropout(dropout)] if dropout else []
    model = nn.Sequential(nn.Linear(8, 16), *extra, nn.Tanh(), nn.Linear(16, 12))
    return sk.sparsify_(model, 0.5, block, seed=0).to(dtype)


def batches(count: int = 4, dtype=torch.float32, rows: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, 8, generator=generator, dtype=dtype) for _ in range(count)]


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def loss_of(model: nn.Module):
    return lambda x: (model(x) - x.sum(1, keepdim=True)).square().mean()


def train(model, optimizer, agent, epochs: int, data, *, refresh: bool = True, loss=None) -> None:
    loss = loss or loss_of(model)
    for _ in range(epochs):
        if refresh:
            agent.refresh(data, loss)
        for x in data:
            agent.backward(lambda x=x: loss(x))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            agent.step()


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}
