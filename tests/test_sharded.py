"""Under FSDP2 (``fully_shard``) what is not supported says so in one sentence, before anything has changed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import sparsekern as sk
from tests.training.test_base import batch, make

SAID = r"values of '0' are a DTensor; (?:(?!\. ).)*"

CALLS = {
    "SET built before": lambda m, early, path: early["SET"].step(),
    "SET, update": lambda m, early, path: early["SET"].update(),
    "RigL built before": lambda m, early, path: early["RigL"].step(),
    "VRPGE built before, backward": lambda m, early, path: early["VRPGE"].backward(lambda: m(batch(0)).sum()),
    "VRPGE built before": lambda m, early, path: early["VRPGE"].step(),
    "AGENT built before, backward": lambda m, early, path: early["AGENT"].backward(lambda: m(batch(0)).sum()),
    "AGENT built before, refresh": lambda m, early, path: early["AGENT"].refresh(),
    "SET": lambda m, early, path: sk.SET(m, torch.optim.SGD(m.parameters())),
    "AGENT": lambda m, early, path: sk.AGENT(m, torch.optim.SGD(m.parameters())),
    "save": lambda m, early, path: sk.save(m, path / "a.safetensors"),
    "save, torch": lambda m, early, path: sk.save(m, path / "a.pt"),
    "load_": lambda m, early, path: sk.load_(m, make().state_dict()),
    "load_, assign": lambda m, early, path: sk.load_(m, make().state_dict(), assign=True),
    "densify": lambda m, early, path: sk.densify(m),
    "summary": lambda m, early, path: sk.summary(m, batch(0)),
}

METHODS = {
    "SET": lambda m, o: sk.SET(m, o, update_every=1),
    "RigL": lambda m, o: sk.RigL(m, o, update_every=1, scoring="screen"),
    "VRPGE": lambda m, o: sk.VRPGE(m, o, stop=9),
    "AGENT": lambda m, o: sk.AGENT(m, o, estimate="gradients", every=2),
}


def shard(model: nn.Module) -> None:
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def run_rank(rank: int, folder: str, world: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    said: dict[str, str] = {}
    for name, call in CALLS.items():
        model, early = make(), {}
        kind = name.partition(" ")[0].rstrip(",")
        if "built before" in name or "update" in name:
            early[kind] = METHODS[kind](model, torch.optim.SGD(model.parameters(), lr=0.1))
        shard(model)
        before = [t.full_tensor() if hasattr(t, "device_mesh") else t.clone() for t in model.state_dict().values()]
        try:
            call(model, early, Path(folder) / str(rank))
            said[name] = "nothing"
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
        after = [t.full_tensor() if hasattr(t, "device_mesh") else t for t in model.state_dict().values()]
        if not all(torch.equal(x, y) for x, y in zip(before, after, strict=True)):
            said[name] += " AND SOMETHING CHANGED"
    model = make()
    shard(model)
    said["summary of sizes"] = f"{len(sk.summary(model, batch(0), measure=False).rows)} rows"
    torch.save(said, f"{folder}/said-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("sharded")
    for rank in range(2):
        (folder / str(rank)).mkdir()
    mp.spawn(run_rank, (str(folder), 2), nprocs=2)
    return [torch.load(folder / f"said-{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", CALLS)
def test_one_sentence(said, name):
    for rank in said:
        assert re.fullmatch(f"NotImplementedError: {SAID}", rank[name]), rank[name]


def test_what_needs_no_whole_tensor_works(said):
    assert all(rank["summary of sizes"] == "3 rows" for rank in said)


def run_rank_apart(rank: int, folder: str) -> None:
    """Build methods of models that differ between ranks in what the name says."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=3)
    odd = rank == 2
    pair = dist.new_group([0, 1])

    def built(what: str, **options) -> str:
        model = make(0)
        if what == "topology" and odd:
            layer = model[2]
            free = next(k for k in range(layer.grid.cells) if k not in layer.topology.keys().tolist())
            place = torch.tensor([free // layer.grid.cols]), torch.tensor([free % layer.grid.cols])
            layer.move_(torch.tensor([1]), *place)
        if what == "layers" and odd:
            model = model[:3]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        try:
            kind = sk.GSE if what == "method" and odd else sk.SET
            every = 5 if what == "schedule" and odd else 1
            method = kind(model, optimizer, update_every=every, seed=int(what == "seed" and odd), **options)
        except ValueError as error:
            return str(error)
        if what == "later":
            model(batch(0)).sum().backward()
            optimizer.step()
            method.step()
            method.seed += int(odd)  # ranks draw other places from here on
            optimizer.step()
            try:
                method.step()
            except ValueError as error:
                return str(error)
        return "nothing"

    said = {what: built(what) for what in ("same", "seed", "topology", "layers", "method", "schedule", "later")}
    said["spared"] = built("seed", check_ranks=False)
    if rank < 2:
        said["group"] = built("seed", process_group=pair)
    torch.save(said, f"{folder}/apart-{rank}.pt")
    dist.destroy_process_group()


def test_ranks_that_differ_say_in_what(tmp_path):
    mp.spawn(run_rank_apart, (str(tmp_path),), nprocs=3)
    for rank in range(3):
        said = torch.load(tmp_path / f"apart-{rank}.pt", weights_only=True)
        assert said["same"] == said["spared"] == said.get("group", "nothing") == "nothing"
        assert said["seed"].startswith("ranks differ in seed (0 on rank 0, 1 on rank 2): build model and method alike")
        assert said["topology"].startswith("ranks differ in the blocks of '2' (rank 2 from rank 0)")
        assert said["layers"].startswith("ranks differ in the blocks of '4' (rank 2 from rank 0)")
        assert said["method"].startswith("ranks differ in method (SET on rank 0, GSE on rank 2)")
        assert said["schedule"].startswith("ranks differ in update_every, start and stop ((1, 0, None) on rank 0, (5,")
        assert said["later"].startswith("ranks differ in seed (0 on rank 0, 1 on rank 2)")
