"""Methods in a loop of accelerate: its wrappers, accumulation, and its own checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sparsekern as sk

accelerate = pytest.importorskip("accelerate")

BATCHES = [torch.randn(4, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(24)]


def method_of(name: str, model, optimizer):
    if name == "vrpge":
        return sk.VRPGE(model, optimizer, sparsity=0.75, stop=9)
    if name == "agent":
        inner = sk.SET(model, optimizer, update_every=2)
        return sk.AGENT(model, optimizer, method=inner, estimate="gradients", gamma=0.5, every=3)
    return sk.training.METHODS[name](model, optimizer, update_every=2)


def train(name: str, folder: Path, *, start: int = 0, end: int = 24, accumulate: int = 2):
    """Twenty-four batches, two a step; save after batch 10, or go on from there."""
    torch.manual_seed(0)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model = sk.sparsify_(torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 16)), 0.5, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 12)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    sparse = method_of(name, model, optimizer)
    accelerator.register_for_checkpointing(sparse)
    if start:
        accelerator.load_state(folder)
    for number in range(start, end):
        with accelerator.accumulate(model):

            def loss(x=BATCHES[number]):
                return (model(x) - 1).square().mean() / accumulate

            if name in ("vrpge", "agent"):
                sparse.backward(loss)
            else:
                accelerator.backward(loss() * accumulate)  # which divides
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        sparse.step()
        if number == 9:
            accelerator.save_state(folder)
    return accelerator.unwrap_model(model), sparse


@pytest.mark.parametrize("name", ["set", "rigl", "gse", "vrpge", "agent"])
def test_a_run_goes_on_from_save_state_with_the_same_bits(name: str, tmp_path: Path):
    whole, sparse = train(name, tmp_path)
    assert sparse.metrics()["steps"] == 12 and sparse.metrics()["updates"] > 0
    again, resumed = train(name, tmp_path, start=10)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in whole.state_dict().items())
    assert resumed.metrics()["itop/global"] == sparse.metrics()["itop/global"]


def test_it_is_the_loop_that_one_writes_by_hand(tmp_path: Path):
    model, _ = train("set", tmp_path)
    torch.manual_seed(0)
    twin = sk.sparsify_(torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 16)), 0.5, 8)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 12)
    sparse = method_of("set", twin, optimizer)
    for number, x in enumerate(BATCHES):
        ((twin(x) - 1).square().mean() / 2).backward()
        if number % 2:
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            sparse.step()
    for key, value in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value)


def test_a_prepared_optimizer_goes_on_when_the_model_becomes_dense(tmp_path: Path):
    accelerator = accelerate.Accelerator(cpu=True)
    model = sk.sparsify_(torch.nn.Sequential(torch.nn.Linear(64, 16)), 0.5, 8)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    for x in BATCHES[:4]:
        accelerator.backward(model(x).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    sk.densify_(model, optimizer=optimizer)
    assert optimizer.optimizer.state[model[0].weight]["step"] == 4
