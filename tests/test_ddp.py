"""Two ranks under DistributedDataParallel: the same topology without a word between them, and one process's numbers."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

import sparsekern as sk

STEPS, BATCH = 9, 8


def build() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 5))
    model.register_buffer("c", torch.zeros(2))
    return sk.sparsify_(model, 0.5, (4, 8))


METHODS = {
    "SET": (sk.SET, {}),
    "RigL": (sk.RigL, {"scoring": "screen"}),  # what it does on several ranks anyway
    "GSE": (sk.GSE, {}),
    "GSE, global": (sk.GSE, {"scope": "global"}),
    "GraBo": (sk.GSE, {"distribution": "grabo"}),
    "GraEst": (sk.GSE, {"distribution": "graest"}),
}


VRPGE = {
    "VRPGE": (sk.VRPGE, {"stop": 8}),
    "VRPGE, weights on all": (sk.VRPGE, {"stop": 8, "weight_step": "all"}),
}
"""Blocks move once, at the end of the choice, and what is chosen hangs on rounding in a sum of two halves."""


AGENTS = {
    "AGENT": {},
    "AGENT, gradients": {"estimate": "gradients"},
    "AGENT, no pass": {"estimate": "gradients", "every": 3, "scope": "layer"},
}


def batch(step: int, rank: int, world: int) -> torch.Tensor:
    return torch.randn(BATCH, 12, generator=torch.Generator().manual_seed(step)).chunk(world)[rank]


def train(model: nn.Module, rank: int, world: int, name: str) -> None:
    """Train; ranks take their share of each batch, or all of it when ``world`` is 1."""
    if name in AGENTS:
        train_agent(model, rank, world, name)
        return
    kind, options = (METHODS | VRPGE)[name]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    method = kind(model, optimizer, update_every=3, seed=1, **options)
    for step in range(STEPS):
        x = batch(step, rank, world)
        method.backward(lambda x=x: model(x).square().mean())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert method.step() == (step == 7 if name in VRPGE else step % 3 == 2)


def train_agent(model: nn.Module, rank: int, world: int, name: str) -> None:
    """Train with two micro-batches a step, the first of which is not reduced over ranks."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    method = sk.GSE(model, optimizer, update_every=3, seed=1)
    agent = sk.AGENT(model, optimizer, method=method, gamma=0.5, **AGENTS[name])
    for step in range(STEPS):
        if step % 3 == 0 and agent.every is None:
            agent.refresh([batch(s, rank, world) for s in range(3)], lambda x: model(x).square().mean())
        first, second = batch(step, rank, world).chunk(2)
        with model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext():
            agent.backward(lambda x=first: model(x).square().mean() / 2)
        agent.backward(lambda x=second: model(x).square().mean() / 2)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert agent.step() == (step % 3 == 2)
    assert all(c > 0 for c in agent.c.values())
    with torch.no_grad():  # what only the state would tell goes where the test looks
        (model.module if isinstance(model, DistributedDataParallel) else model).c.copy_(
            torch.tensor([agent.metrics()["c"], agent.metrics()["variance_ratio"]])
        )


def run_rank(rank: int, folder: str, split: bool, sync_buffers: bool, names: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    options = {} if sync_buffers else {"forward_sync_buffers": False}
    for name in names:
        model = build()
        train(DistributedDataParallel(model, **options), rank if split else 0, 2 if split else 1, name)
        torch.save(model.state_dict(), f"{folder}/{name}-{rank}.pt")
    dist.destroy_process_group()


def ranks(folder: Path, split: bool, sync_buffers: bool, names: list[str]) -> dict[str, list[dict[str, torch.Tensor]]]:
    """Return what each rank has learnt, by method."""
    mp.spawn(run_rank, (str(folder), split, sync_buffers, names), nprocs=2)
    return {n: [torch.load(folder / f"{n}-{rank}.pt", weights_only=True) for rank in range(2)] for n in names}


def alone(name: str) -> dict[str, torch.Tensor]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = build()
    train(model, 0, 1, name)
    torch.set_num_threads(threads)
    return model.state_dict()


HAS_FORWARD_SYNC = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters


@pytest.mark.parametrize(
    "sync_buffers",
    [
        True,
        pytest.param(
            False,
            marks=pytest.mark.skipif(not HAS_FORWARD_SYNC, reason="forward_sync_buffers is new in torch 2.13"),
        ),
    ],
)
def test_the_same_data_on_both_ranks_is_one_process_bit_for_bit(tmp_path, sync_buffers):
    names = ["SET", *VRPGE]
    for name, (first, second) in ranks(tmp_path, split=False, sync_buffers=sync_buffers, names=names).items():
        for key, value in alone(name).items():
            assert torch.equal(first[key], second[key]) and torch.equal(first[key], value), (name, key)


@pytest.fixture(scope="module")
def split_runs(tmp_path_factory):
    return ranks(tmp_path_factory.mktemp("split"), split=True, sync_buffers=True, names=[*METHODS, *AGENTS, *VRPGE])


@pytest.mark.parametrize("name", [*METHODS, *AGENTS])
def test_a_batch_split_over_ranks_gives_one_topology(split_runs, name):
    first, second = split_runs[name]
    single = alone(name)
    for key, value in single.items():
        assert torch.equal(first[key], second[key]), key
        if name == "GraEst":
            continue  # other parts have other signs, hence other candidates
        if value.dtype == torch.int32:
            assert torch.equal(first[key], value), key
        else:
            # AdamW divides by the root of the second moment, so rounding in a sum of two halves grows to its scale
            torch.testing.assert_close(first[key], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", VRPGE)
def test_ranks_of_vrpge_choose_the_same_blocks(split_runs, name):
    first, second = split_runs[name]
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def train_uneven(kind: type[sk.Method], rank: int, method_options: dict[str, bool], **options: bool) -> sk.Method:
    """Train on two batches on rank 0 and four on rank 1; return the method, also where it or Join raised."""
    model = DistributedDataParallel(build())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = kind(model, optimizer, update_every=1, **method_options)
    try:
        with Join([model], **options):
            for step in range(2 + 2 * rank):
                model(batch(step, rank, 2)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                method.step()
    except (NotImplementedError, RuntimeError) as error:
        method.error = str(error)
    return method


def run_uneven(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for kind in (sk.RigL, sk.GSE, sk.SET):
        method = train_uneven(kind, rank, {})
        assert f"{kind.__name__} needs all ranks at each update" in method.error and "drop_last=True" in method.error
        assert method.steps == 1 and method.updates == 0
    method = train_uneven(sk.RigL, rank, {}, throw_on_early_termination=True)
    assert "exhausted" in method.error and method.updates == 1
    method = train_uneven(sk.SET, rank, {"check_ranks": False})
    assert method.updates == 2 + 2 * rank
    places = {name: torch.stack([layer.row, layer.col]) for name, layer in method.layers.items()}
    torch.save(places, f"{folder}/uneven-{rank}.pt")
    dist.destroy_process_group()


def test_ranks_that_run_out_of_batches_are_refused_where_the_method_needs_them(tmp_path):
    mp.spawn(run_uneven, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"uneven-{rank}.pt", weights_only=True) for rank in range(2))
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
