"""Several processes of a test: ranks of a process group, as torchrun starts them, and commands that run side by side.

All of them are forked from one process that has imported what they need: to import it takes longer than most tests.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

multiprocessing.set_forkserver_preload(
    ["sparsekern.cli.main", "torch._dynamo", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp"]
)


def on_ranks(work: Callable[..., Any], count: int, folder: Path, *arguments: Any) -> list[Any]:
    """Call ``work(rank, *arguments)`` in ``count`` processes; return what each rank returned.

    ``work`` is a function of a module that returns plain values and tensors. An error on one rank ends all of them and
    is raised here.
    """
    mp.start_processes(_run, (work, count, folder, arguments), nprocs=count, start_method="forkserver")
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(count)]


def _run(rank: int, work: Callable[..., Any], count: int, folder: Path, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    torch.save(work(rank, *arguments), folder / f"rank-{rank}.pt")
    dist.destroy_process_group()


def refusal(call: Callable[[], object]) -> str:
    """Return the kind and the text of the error that a call must raise, "nothing" if it returns."""
    try:
        call()
    except (NotImplementedError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def start_command(arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> BaseProcess:
    """Start ``sparsekern`` with these arguments and more of an environment; what it says on stderr goes to ``log``."""
    process = multiprocessing.get_context("forkserver").Process(target=_command, args=(arguments, environment, log))
    process.start()
    return process


def _command(arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
    from sparsekern.cli.main import application

    os.environ.update(environment)
    for number, path in ((1, os.devnull), (2, log)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    torch.set_num_threads(1)
    application()(arguments)
