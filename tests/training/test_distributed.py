"""Sums over ranks; what several ranks do with them is in tests/test_distributed.py."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sparsekern.training.distributed import Ranks


def test_one_process_keeps_what_it_has():
    tensor = torch.tensor([1.0, 2.0])
    assert Ranks().count == 1
    assert Ranks().sum(tensor) is tensor and Ranks().from_first(tensor) is tensor and Ranks().mean(tensor) is tensor
    assert tensor.tolist() == [1, 2]


def run_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=3)
    everyone, pair = Ranks(), Ranks(dist.new_group([1, 2]))
    own = torch.tensor([1.0, 10.0]) * (rank + 1)
    found = {"ranks": everyone.count, "sum": everyone.sum(own.clone()), "first": everyone.from_first(own.clone())}
    found["mean"] = everyone.mean(own.clone())
    if rank:
        found |= {"pair ranks": pair.count, "pair sum": pair.sum(own.clone())}
        found |= {"pair first": pair.from_first(own.clone())}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_all_ranks_or_those_of_a_group(tmp_path):
    mp.spawn(run_rank, (str(tmp_path),), nprocs=3)
    for rank in range(3):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found["ranks"] == 3
        assert found["sum"].tolist() == [6, 60] and found["first"].tolist() == [1, 10]
        assert found["mean"].tolist() == [2, 20]
        if rank:
            assert found["pair ranks"] == 2
            assert found["pair sum"].tolist() == [5, 50] and found["pair first"].tolist() == [2, 20]
