"""Sums over ranks, and ranks that differ; what methods do on several ranks is in tests/test_distributed.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import sparsekern as sk
from bench.traffic import Traffic
from sparsekern.topology import Move
from sparsekern.training.distributed import Ranks
from tests.training.test_base import batch, make

RANKS = 3


def test_one_process_keeps_what_it_has():
    tensor = torch.tensor([1.0, 2.0])
    assert Ranks().count == 1
    assert Ranks().sum(tensor) is tensor and Ranks().from_first(tensor) is tensor and Ranks().mean(tensor) is tensor
    assert tensor.tolist() == [1, 2]


def sums(rank: int) -> dict[str, Any]:
    everyone, pair = Ranks(), Ranks(dist.new_group([1, 2]))
    own = torch.tensor([1.0, 10.0]) * (rank + 1)
    found = {"ranks": everyone.count, "sum": everyone.sum(own.clone()), "first": everyone.from_first(own.clone())}
    found["mean"] = everyone.mean(own.clone())
    if rank:
        found |= {"pair ranks": pair.count, "pair sum": pair.sum(own.clone())}
        found |= {"pair first": pair.from_first(own.clone())}
    return found


def differences(rank: int) -> dict[str, str]:
    """Build methods of models that differ between ranks in what the name says; return what each raises."""
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
            kind = sk.GSE if what == "sketches" or (what == "method" and odd) else sk.SET
            if what == "sketches":
                options["score_sketches"] = 3 if odd else 2
            every = 5 if what == "schedule" and odd else 1
            method = kind(model, optimizer, update_every=every, seed=int(what == "seed" and odd), **options)
            if what == "later":
                model(batch(0)).sum().backward()
                optimizer.step()
                method.step()
                method.seed += int(odd)  # ranks draw other places from here on
                optimizer.step()
                method.step()
        except ValueError as error:
            return str(error)
        return "nothing"

    whats = ("same", "seed", "topology", "layers", "method", "schedule", "sketches", "later")
    said = {what: built(what) for what in whats}
    said["spared"] = built("seed", check_ranks=False)
    return said | {"group": built("seed", process_group=pair) if rank < 2 else "nothing"}


def traffic(rank: int) -> dict[str, int]:
    """Return what bench/traffic.py counts of one collective of each kind, over 300 numbers of 4 bytes."""
    whole, part = torch.ones(300), torch.ones(100)
    with Traffic() as seen:
        Ranks().sum(whole)
        dist.all_gather_into_tensor(whole, part)
        dist.reduce_scatter_tensor(part, whole)
        Ranks().from_first(whole)
        Ranks().sum(torch.ones(2))
    return dict(seen.sent)


def choices(rank: int) -> dict[str, Tensor]:
    """Return the moves of three ranks, of which each chose others, and one layer that only the last one moves."""
    layers = sk.sparse_layers(make(0))
    first, second, *_ = layers
    slots = torch.arange(2 - rank % 2)
    moves = {first: Move(slots + rank, slots.int() * 0 - 1, slots.int() * 0 - 1)}
    if rank == 2:
        moves[second] = moves[first]
    found = Ranks().first_choice(moves, layers)
    assert list(found) == [first]
    return dict(zip(Move._fields, found[first], strict=True))


def proposals(rank: int) -> dict[str, Any]:
    """RigL's candidates where only block column ``rank`` of the gradient is not zero; rank 1 once has a NaN."""
    model = nn.Sequential(sk.SparseLinear(12, 12, blocks=6, block_size=2, bias=False, seed=0, name="0"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method = sk.RigL(model, optimizer, update_every=3, drop_fraction=0.5, shortlist=2.0, score_sketches=2)
    layer, found = model[0], []
    present, values = layer.topology.keys().clone(), layer.values.detach().clone()
    for step in range(4):
        x = torch.zeros(4, 12)
        x[:, 2 * rank : 2 * rank + 2] = torch.nan if (rank, step) == (1, 1) else 1.0
        (model(x) - 1).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        layer.values.data.copy_(values)
        with Traffic() as seen:
            method.step()
        found.append((method._stage, dict(seen.sent)))
    moved = layer.topology.keys()
    return {"present": present, "keys": method._keys["0"], "grown": moved[~torch.isin(moved, present)], "found": found}


def run_rank(rank: int, folder: Path) -> dict[str, Any]:
    return {
        "sums": sums(rank),
        "differences": differences(rank),
        "traffic": traffic(rank),
        "choices": choices(rank),
        "proposals": proposals(rank),
    }


def test_all_ranks_or_those_of_a_group(ranks):
    for rank, found in enumerate(each["sums"] for each in ranks):
        assert found["ranks"] == 3
        assert found["sum"].tolist() == [6, 60] and found["first"].tolist() == [1, 10]
        assert found["mean"].tolist() == [2, 20]
        if rank:
            assert found["pair ranks"] == 2
            assert found["pair sum"].tolist() == [5, 50] and found["pair first"].tolist() == [2, 20]


def test_the_first_rank_chooses(ranks):
    """Whatever the others chose, and however many blocks."""
    for found in (rank["choices"] for rank in ranks):
        assert found["slots"].tolist() == [0, 1] and found["row"].tolist() == found["col"].tolist() == [-1, -1]


def test_traffic_is_what_a_ring_sends(ranks):
    """Two thirds of 1200 bytes, twice in an all-reduce, which is a scatter and a gather."""
    for found in (rank["traffic"] for rank in ranks):
        assert found == {"reduce": 1600, "gather": 800, "scatter": 800, "broadcast": 1200, "small reduce": 10}


def test_ranks_propose_places_by_their_own_sketches(ranks):
    """Two of six each, 16 bytes that are sent on: no sketches. The update comes a step late, after the NaN."""
    for found in (rank["proposals"] for rank in ranks):
        keys = found["keys"]
        assert keys.tolist() == sorted(set(keys.tolist())) and not torch.isin(keys, found["present"]).any()
        assert torch.bincount(keys % 6, minlength=6).tolist() == [2, 2, 2, 0, 0, 0]
        assert found["grown"].numel() == 3 and torch.isin(found["grown"], keys).all()
        stages, sent = zip(*found["found"], strict=True)
        assert stages == (0, 0, 1, 0), "a NaN on one rank is seen by all"
        assert sent[2] == {"small reduce": 5, "gather": 16}


def test_ranks_that_differ_say_in_what(ranks):
    for said in (rank["differences"] for rank in ranks):
        assert said["same"] == said["spared"] == said["group"] == "nothing"
        assert said["seed"].startswith("ranks differ in seed (0 on rank 0, 1 on rank 2): build model and method alike")
        assert said["topology"].startswith("ranks differ in the blocks of '2' (rank 2 from rank 0)")
        assert said["layers"].startswith("ranks differ in the blocks of '4' (rank 2 from rank 0)")
        assert said["method"].startswith("ranks differ in method (SET on rank 0, GSE on rank 2)")
        assert said["schedule"].startswith("ranks differ in update_every, start and stop ((1, 0, None) on rank 0, (5,")
        assert said["sketches"].startswith("ranks differ in score_sketches (2 on rank 0, 3 on rank 2)")
        assert said["later"].startswith("ranks differ in seed (0 on rank 0, 1 on rank 2)")
