"""Runs a test's function on several ranks of a process group: processes that talk by gloo, as torchrun starts them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(work: Callable[..., Any], count: int, folder: Path, *arguments: Any) -> list[Any]:
    """Call ``work(rank, *arguments)`` in ``count`` processes; return what each rank returned.

    ``work`` is a function of a module that returns plain values and tensors. An error on one rank ends all of them and
    is raised here.
    """
    mp.spawn(_run, (work, count, folder, arguments), nprocs=count)
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(count)]


def _run(rank: int, work: Callable[..., Any], count: int, folder: Path, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    torch.save(work(rank, *arguments), folder / f"rank-{rank}.pt")
    dist.destroy_process_group()
