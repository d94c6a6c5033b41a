"""Two ranks under DistributedDataParallel: the same topology without a word between them, and one process's numbers."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sparsekern as sk

STEPS, BATCH = 9, 8


def build() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 5))
    return sk.sparsify_(model, 0.5, (4, 8))


METHODS = {
    "set": lambda model, optimizer: sk.SET(model, optimizer, update_every=3, seed=1),
    "vrpge": lambda model, optimizer: sk.VRPGE(model, optimizer, stop=8, seed=1),
    "vrpge, weights on all": lambda model, optimizer: sk.VRPGE(model, optimizer, weight_step="all", stop=8, seed=1),
}
MOVES = {"set": [2, 5, 8], "vrpge": [7], "vrpge, weights on all": [7]}
"""The steps at which blocks move: updates of SET, the end of VR-PGE's choice."""


def train(model: nn.Module, rank: int, world: int, name: str = "set") -> None:
    """Train; ranks take their share of each batch, or all of it when ``world`` is 1."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    method = METHODS[name](model, optimizer)
    for step in range(STEPS):
        x = torch.randn(BATCH, 12, generator=torch.Generator().manual_seed(step))
        x = x.chunk(world)[rank]
        method.backward(lambda x=x: model(x).square().mean())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert method.step() == (step in MOVES[name])


def run_rank(rank: int, folder: str, split: bool, sync_buffers: bool, name: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    options = {} if sync_buffers else {"forward_sync_buffers": False}
    model = build()
    train(DistributedDataParallel(model, **options), rank if split else 0, 2 if split else 1, name)
    torch.save(model.state_dict(), f"{folder}/rank-{rank}.pt")
    dist.destroy_process_group()


def ranks(folder: Path, split: bool, sync_buffers: bool, name: str = "set") -> list[dict[str, torch.Tensor]]:
    mp.spawn(run_rank, (str(folder), split, sync_buffers, name), nprocs=2)
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]


def alone(name: str = "set") -> dict[str, torch.Tensor]:
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
    first, second = ranks(tmp_path, split=False, sync_buffers=sync_buffers)
    single = alone()
    for key, value in single.items():
        assert torch.equal(first[key], second[key]) and torch.equal(first[key], value), key


def test_a_batch_split_over_ranks_gives_one_topology(tmp_path):
    first, second = ranks(tmp_path, split=True, sync_buffers=True)
    single = alone()
    for key, value in single.items():
        assert torch.equal(first[key], second[key]), key
        if value.dtype == torch.int32:
            assert torch.equal(first[key], value), key
        else:
            # AdamW divides by the root of the second moment, so rounding in a sum of two halves grows to its scale
            torch.testing.assert_close(first[key], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["vrpge", "vrpge, weights on all"])
def test_ranks_of_vrpge_agree_to_the_bit_and_with_one_process(tmp_path, name):
    """Masks follow from the seed, losses are averaged: the same data on both ranks is one process."""
    first, second = ranks(tmp_path, split=False, sync_buffers=True, name=name)
    for key, value in alone(name).items():
        assert torch.equal(first[key], second[key]) and torch.equal(first[key], value), key


def test_ranks_of_vrpge_choose_the_same_blocks_from_a_split_batch(tmp_path):
    first, second = ranks(tmp_path, split=True, sync_buffers=True, name="vrpge")
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
