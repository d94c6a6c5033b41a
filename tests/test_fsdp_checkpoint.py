"""Checkpoints of model, optimizer and method under ``fully_shard``: saved by two ranks, loaded by any number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh

import sparsekern as sk
from tests import fsdp
from tests.fsdp import assert_same

RANKS = 3
METHODS = ("SET, signs", "RigL", "GSE", "VRPGE")
SAVED = 5
"""The step after which all is saved: between updates, with probes armed for the next one."""

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
TO_ALL = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)

Parts = tuple[nn.Module, torch.optim.Optimizer, sk.Method]


def build(name: str, mesh: DeviceMesh | None, seed: int = 0) -> Parts:
    """Build all parts; another seed gives other places and values."""
    model = fsdp.linear()
    if seed:
        for layer in (model[0], model[2]):
            places = sk.SparseLinear(
                layer.in_features, layer.out_features, blocks=layer.topology.blocks(), block_size=(2, 4), seed=seed
            ).topology
            layer.row[: places.slots].copy_(places.row)
            layer.col[: places.slots].copy_(places.col)
            layer.refresh_()
            nn.init.ones_(layer.values)
    options = {}
    if mesh is not None:
        model, options = fsdp.shard(model, mesh), {"process_group": mesh.get_group()}
    return model, *fsdp.build_parts(model, name, **options)


def go_on(parts: Parts, steps: range) -> dict[str, Tensor]:
    return fsdp.train(parts[0], "", parts=parts[1:], steps=steps)


def states(parts: Parts) -> dict[str, Any]:
    model, optimizer, _ = parts
    return dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True))


def load(path: Path, parts: Parts, group: dist.ProcessGroup | None) -> None:
    model, optimizer, method = parts
    loaded = states(parts)
    dcp.load(loaded, checkpoint_id=path, process_group=group)
    set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optim"])
    dcp.load({"method": method}, checkpoint_id=path, process_group=group)


def load_full(path: Path, parts: Parts, rank: int) -> None:
    """Load a file that the first rank reads."""
    model, optimizer, method = parts
    found = torch.load(path, weights_only=True) if rank == 0 else {"model": {}, "optim": {}}
    set_model_state_dict(model, found["model"], options=TO_ALL)
    set_optimizer_state_dict(model, optimizer, found["optim"], options=TO_ALL)
    state = [found.get("method")]
    dist.broadcast_object_list(state)
    method.load_state_dict(state[0])


def bare_load(path: Path, name: str, mesh: DeviceMesh) -> None:
    """Check that places are not used with an old index after a load that called no hook."""
    model, *_ = build(name, mesh, seed=1)
    dcp.load({"model": model.state_dict()}, checkpoint_id=path, process_group=mesh.get_group())
    with pytest.raises(ValueError, match=r"call sparsekern.refresh_\(model\)"):
        model(fsdp.batch(0))
    sk.refresh_(model)
    expected, *_ = build(name, mesh)
    load(path, (expected, *fsdp.build_parts(expected, name, process_group=mesh.get_group())), mesh.get_group())
    assert torch.equal(model(fsdp.batch(0)), expected(fsdp.batch(0)))


def run_rank(rank: int, folder: Path) -> dict[str, Any]:
    pair, three = DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [0, 1, 2])
    writers = dist.new_group([0, 1])  # training communicates while they write
    found: dict[str, Any] = {"unbroken": {}, "two": {}, "asynchronous": {}, "three": {}, "full": {}}
    for name in METHODS:
        if rank < 2:
            group = pair.get_group()
            found["unbroken"][name] = go_on(build(name, pair), range(fsdp.STEPS))
            parts = build(name, pair)
            go_on(parts, range(SAVED))
            saved = states(parts) | {"method": parts[2]}
            dcp.save(saved, checkpoint_id=folder / name, process_group=group)
            writing = dcp.async_save(saved, checkpoint_id=folder / f"{name}, later", process_group=writers)
            model, optim = get_state_dict(*parts[:2], options=FULL)
            if rank == 0:
                torch.save({"model": model, "optim": optim, "method": parts[2].state_dict()}, folder / f"{name}.pt")
            go_on(parts, range(SAVED, fsdp.STEPS))  # while it is written
            writing.result()
            for way, path in (("two", folder / name), ("asynchronous", folder / f"{name}, later")):
                load(path, parts := build(name, pair, seed=1), group)
                found[way][name] = go_on(parts, range(SAVED, fsdp.STEPS))
        dist.barrier()
        load(folder / name, parts := build(name, three, seed=1), three.get_group())
        found["three"][name] = go_on(parts, range(SAVED, fsdp.STEPS))
        load_full(folder / f"{name}.pt", parts := build(name, three, seed=1), rank)
        found["full"][name] = go_on(parts, range(SAVED, fsdp.STEPS))
    if rank < 2:
        bare_load(folder / "GSE", "GSE", pair)
    return found


@pytest.mark.parametrize("way", ["two", "asynchronous"])
@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_go_on_as_the_unbroken_run_bit_for_bit(ranks, name, way):
    expected = ranks[0]["unbroken"][name]
    assert expected["updates"] == 4
    assert_same(expected, [rank[way][name] for rank in ranks[:2]] + [ranks[1]["unbroken"][name]])


@pytest.mark.parametrize("way", ["three", "full"])
@pytest.mark.parametrize("name", METHODS)
def test_three_ranks_go_on_from_shards_and_from_one_file(ranks, name, way):
    assert_same(ranks[0]["unbroken"][name], [rank[way][name] for rank in ranks], 1e-6)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # of PyTorch, about loading without ranks
@pytest.mark.parametrize("name", METHODS)
def test_one_process_without_ranks_goes_on_bit_for_bit(ranks, folder, name):
    load(folder / name, parts := build(name, None, seed=1), None)
    assert_same(ranks[0]["unbroken"][name], [go_on(parts, range(SAVED, fsdp.STEPS))])


def test_places_loaded_without_a_hook_are_noticed(ranks):
    """The check is on the ranks: the next forward raises in place of computing with an old index."""
    assert set(ranks[0]["unbroken"]) == set(METHODS)
