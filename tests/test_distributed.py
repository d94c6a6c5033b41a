"""Methods on several ranks: the same topology without a word between them, and one process's numbers.

Under DistributedDataParallel everything works; under FSDP2 (``fully_shard``) what does not says so in one sentence,
before anything has changed.
"""

from __future__ import annotations

import inspect
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import sparsekern as sk
from sparsekern.nn.sharded import is_sharded, sharded_as, whole
from tests.training import test_base

RANKS, STEPS, BATCH = 2, 9, 8


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
    "Gradual": (sk.Gradual, {"scope": "global", "stop": 10}),
    "MEST": (sk.MEST, {"drop_fraction": 0.3}),
    "SRigL": (sk.SRigL, {"scoring": "screen"}),
    "DSR": (sk.DSR, {"threshold": 0.1}),
    "TopKAST": (sk.TopKAST, {"drop_fraction": 0.5, "regularization": 0.1}),
    "GraNet": (sk.GraNet, {"scoring": "screen", "stop": 10}),
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
HAS_FORWARD_SYNC = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters


def batch(step: int, rank: int, world: int) -> Tensor:
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


def alone(name: str) -> dict[str, Tensor]:
    model = build()
    train(model, 0, 1, name)
    return model.state_dict()


# FSDP2.

SAID = r"values of '0' are a DTensor(; |, but not by fully_shard before the method was built: )(?:(?!\. ).)*"
WHOLE_BATCH = test_base.batch(0)

CALLS = {
    "SET built before": lambda m, early, path: early["SET"].step(),
    "SET, update": lambda m, early, path: early["SET"].update(),
    "RigL built before": lambda m, early, path: early["RigL"].step(),
    "VRPGE built before": lambda m, early, path: early["VRPGE"].step(),
    "AGENT built before, backward": lambda m, early, path: early["AGENT"].backward(lambda: m(WHOLE_BATCH).sum()),
    "AGENT built before, refresh": lambda m, early, path: early["AGENT"].refresh(),
    "save": lambda m, early, path: sk.save(m, path / "a.safetensors"),
    "save, torch": lambda m, early, path: sk.save(m, path / "a.pt"),
    "load_": lambda m, early, path: sk.load_(m, test_base.make().state_dict()),
    "load_, assign": lambda m, early, path: sk.load_(m, test_base.make().state_dict(), assign=True),
    "densify": lambda m, early, path: sk.densify(m),
    "summary": lambda m, early, path: sk.summary(m, WHOLE_BATCH),
}

EARLY = {
    "SET": lambda m, o: sk.SET(m, o, update_every=1),
    "RigL": lambda m, o: sk.RigL(m, o, update_every=1, scoring="screen"),
    "VRPGE": lambda m, o: sk.VRPGE(m, o, stop=9),
    "AGENT": lambda m, o: sk.AGENT(m, o, estimate="gradients", every=2),
}


def shard(model: nn.Module) -> None:
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def content(model: nn.Module) -> list[Tensor]:
    return [t.full_tensor() if hasattr(t, "device_mesh") else t.clone() for t in model.state_dict().values()]


def sharded_calls(path: Path) -> dict[str, str]:
    """Return what each call raises on a sharded model."""
    said = {}
    for name, call in CALLS.items():
        model, early = test_base.make(), {}
        kind = name.partition(" ")[0].rstrip(",")
        if "built before" in name or "update" in name:
            early[kind] = EARLY[kind](model, torch.optim.SGD(model.parameters(), lr=0.1))
        shard(model)
        before = content(model)
        try:
            call(model, early, path)
            said[name] = "nothing"
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
        if not all(torch.equal(x, y) for x, y in zip(before, content(model), strict=True)):
            said[name] += " AND SOMETHING CHANGED"
    shard(model := test_base.make())
    return said | {"summary of sizes": f"{len(sk.summary(model, WHOLE_BATCH, measure=False).rows)} rows"}


X = torch.randn(5, 10, generator=torch.Generator().manual_seed(1))


def odd_layer(seed: int) -> nn.Module:
    return nn.Sequential(sk.SparseLinear(10, 14, sparsity=0.5, block_size=(4, 3), seed=seed))


def check_sharded_layer() -> None:
    """Check a layer in blocks that do not divide it, whose values are sharded over the ranks."""
    plain, other, model = odd_layer(0), odd_layer(1), odd_layer(0)
    shard(model)
    layer = model[0]

    def assert_computes_as(expected: nn.Module) -> None:
        assert torch.equal(model(X), expected(X))
        model.reshard()
        assert is_sharded(layer.values)

    assert_computes_as(plain)

    # A move writes the part of the values, and of their gradient, that the rank holds.
    moved, free = odd_layer(0), torch.tensor([-1])
    for net in (moved, model):
        net(X).sum().backward()
        net[0].move_(torch.tensor([1]), free, free)
    assert_computes_as(moved)
    assert torch.equal(whole(layer.values.grad), moved[0].values.grad) and not moved[0].values.grad[1].any()
    model.zero_grad()

    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    for net in (moved, model):
        net[0].reset_parameters()
    assert_computes_as(moved)

    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, other.state_dict(), options=options)
    assert_computes_as(other)
    model.load_state_dict(get_model_state_dict(model))  # of DTensors
    assert_computes_as(other)
    model.load_state_dict(plain.state_dict())  # of whole tensors
    assert_computes_as(plain)

    coarse = sk.SparseLinear(10, 14, blocks=1, block_size=(8, 6), seed=2)  # blocks of another size are cut anew
    layer.load_state_dict(coarse.state_dict())
    torch.testing.assert_close(model(X), coarse(X))
    model.reshard()

    dense = nn.Linear(10, 14)
    nn.init.constant_(dense.weight, 1.5)
    nn.init.zeros_(dense.bias)
    layer.load_state_dict(dense.state_dict())
    twin = layer.to_dense()
    assert not is_sharded(twin.weight) and set(twin.weight.unique().tolist()) <= {0.0, 1.5}
    torch.testing.assert_close(twin(X), model(X))


# Ranks that run out of batches.


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


def run_uneven(rank: int) -> dict[str, Tensor]:
    for kind in (sk.RigL, sk.GSE, sk.SET):
        method = train_uneven(kind, rank, {})
        assert f"{kind.__name__} needs all ranks at each update" in method.error and "drop_last=True" in method.error
        assert method.steps == 1 and method.updates == 0
    method = train_uneven(sk.RigL, rank, {}, throw_on_early_termination=True)
    assert "exhausted" in method.error and method.updates == 1
    method = train_uneven(sk.SET, rank, {"check_ranks": False})
    assert method.updates == 2 + 2 * rank
    return {name: torch.stack([layer.row, layer.col]) for name, layer in method.layers.items()}


# Two processes do all of it: starting one takes longer than any of these trainings.


def run_rank(rank: int, folder: Path) -> dict[str, Any]:
    def trained(split: bool, names: list[str], **options: bool) -> dict[str, dict[str, Tensor]]:
        models = {name: build() for name in names}
        for name, model in models.items():
            train(DistributedDataParallel(model, **options), rank if split else 0, 2 if split else 1, name)
        return {name: model.state_dict() for name, model in models.items()}

    same = ["SET", *VRPGE]
    (path := folder / str(rank)).mkdir()
    check_sharded_layer()
    return {
        "same data, True": trained(False, same),
        "same data, False": trained(False, same, forward_sync_buffers=False) if HAS_FORWARD_SYNC else {},
        "split": trained(True, [*METHODS, *AGENTS, *VRPGE]),
        "sharded": sharded_calls(path),
        "uneven": run_uneven(rank),
    }


@pytest.mark.parametrize("sync_buffers", [True, False])
def test_the_same_data_on_both_ranks_is_one_process_bit_for_bit(ranks, sync_buffers):
    if not sync_buffers and not HAS_FORWARD_SYNC:
        pytest.skip("forward_sync_buffers is new in torch 2.13")
    first, second = (rank[f"same data, {sync_buffers}"] for rank in ranks)
    assert set(first) == {"SET", *VRPGE}
    for name in first:
        for key, value in alone(name).items():
            assert torch.equal(first[name][key], second[name][key]), (name, key)
            assert torch.equal(first[name][key], value), (name, key)


@pytest.mark.parametrize("name", [*METHODS, *AGENTS])
def test_a_batch_split_over_ranks_gives_one_topology(ranks, name):
    first, second = (rank["split"][name] for rank in ranks)
    for key, value in alone(name).items():
        assert torch.equal(first[key], second[key]), key
        if name == "GraEst":
            continue  # other parts have other signs, hence other candidates
        if value.dtype == torch.int32:
            assert torch.equal(first[key], value), key
        else:
            # AdamW divides by the root of the second moment, so rounding in a sum of two halves grows to its scale
            torch.testing.assert_close(first[key], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", VRPGE)
def test_ranks_of_vrpge_choose_the_same_blocks(ranks, name):
    first, second = (rank["split"][name] for rank in ranks)
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_ranks_that_run_out_of_batches_are_refused_where_the_method_needs_them(ranks):
    """The refusals are checked on the ranks; SET without a check of ranks goes on, to the same places."""
    first, second = (rank["uneven"] for rank in ranks)
    assert first and all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.mark.parametrize("name", CALLS)
def test_what_needs_whole_tensors_is_refused_under_fsdp(ranks, name):
    for rank in ranks:
        assert re.fullmatch(f"NotImplementedError: {SAID}", rank["sharded"][name]), rank["sharded"][name]


def test_what_needs_no_whole_tensor_works_under_fsdp(ranks):
    """Moves that raise, resetting and loading are checked on the ranks."""
    assert all(rank["sharded"]["summary of sizes"] == "3 rows" for rank in ranks)


def test_plain_tensors_stay_as_they_are():
    tensor = torch.ones(2)
    assert not is_sharded(tensor)
    assert whole(tensor).data_ptr() == tensor.data_ptr()
    assert sharded_as(torch.zeros(2), tensor) is tensor
