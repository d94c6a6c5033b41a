"""Several processes that train one run, as ``torchrun`` starts them: which one this is, and what they agree on."""

from __future__ import annotations

import inspect
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from threading import Thread
from typing import Any, ClassVar, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from sparsekern.errors import InputError
from sparsekern.files.states import metadata_of, with_metadata
from sparsekern.lab.tasks import Batch
from sparsekern.nn import refresh_
from sparsekern.nn.sharded import is_sharded, local, sharded_as, whole
from sparsekern.topology.arguments import check_choice
from sparsekern.training.distributed import Ranks

Result = TypeVar("Result")

STRATEGIES = ("ddp", "fsdp2")


ROLL_CALL = 5.0
"""Seconds, at most, in which ranks that have lost another say that they are still there; a tenth of the timeout."""


class ToldByFirst(InputError):
    """An error that the first rank tells; the others end without a word."""


class LostRank(Exception):
    """Other ranks have ended or do not answer; the text says which."""


@dataclass(frozen=True)
class Launch:
    """How the processes that ``torchrun`` started train together. The command shows what is said of them here.

    Attributes:
        strategy: how they share the work. Each takes a part of every batch. ddp: each has the whole model; fsdp2: each
            stores a part of it, with its gradients and optimizer state.
        timeout: seconds after which they end because one of them does not answer.

    Raises:
        ValueError: a value out of range.
    """

    strategy: str = "ddp"
    timeout: float = 600.0

    def __post_init__(self) -> None:
        check_choice("strategy", self.strategy, STRATEGIES)
        if not 0 < self.timeout < 10**7:
            raise InputError(f"timeout is {self.timeout}; it must be a number of seconds above 0", parameter="timeout")


@dataclass(frozen=True)
class Share:
    """A part of a batch.

    Attributes:
        batch: inputs and targets of the part.
        examples: of the whole batch.
        weight: times which the mean loss of the part counts. The mean over all ranks of such losses is the mean over
            the whole batch.
    """

    batch: Batch
    examples: int
    weight: float = 1.0

    @property
    def counted(self) -> int:
        """Number of examples of the part that count."""
        return self.batch[0].shape[0] if self.weight else 0

    def split(self, count: int) -> list[Share]:
        """Return at most ``count`` parts of about the same size, none of them empty."""
        inputs, targets = self.batch
        parts = zip(inputs.tensor_split(count), targets.tensor_split(count), strict=True)
        whole = inputs.shape[0]
        return [Share(part, self.examples, self.weight * (n / whole)) for part in parts if (n := part[0].shape[0])]


@dataclass(frozen=True)
class World:
    """The processes that train a run together; by default this one alone.

    Attributes:
        rank, count: number of this process, from 0, and of all.
        local: number among those on this machine, and of its GPU.
        strategy: see :class:`Launch`.
        ranks: what the methods of training know of them too: sums and means over all.
    """

    rank: int = 0
    count: int = 1
    local: int = 0
    strategy: str = "ddp"
    ranks: ClassVar[Ranks] = Ranks()

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Return whether it is true on any rank."""
        return flag if self.count == 1 else self.ranks.any(flag, torch.device("cpu"))

    def on_first(self, work: Callable[[], Result]) -> Result:
        """Do something on the first rank alone, and return on all what it returned.

        Raises:
            InputError: that of the first rank, on all.
        """
        if self.count == 1:
            return work()
        result, error = None, None
        if self.first:
            try:
                result = work()
            except Exception as caught:
                error = caught
        told: list[Any] = [result, None if error is None else str(error)]
        dist.broadcast_object_list(told)
        if error is not None:
            raise error
        if told[1] is not None:
            raise ToldByFirst(told[1])
        return cast(Result, told[0])

    def alike(self, work: Callable[[], Result]) -> Result:
        """Do something that ends alike on all ranks, and return what it returned; the first one tells its error."""
        try:
            return work()
        except InputError as error:
            raise error if self.first else ToldByFirst(str(error)) from None

    def together(self, work: Callable[[], Result]) -> Result:
        """Do something on all ranks, and return what it returned.

        Raises:
            InputError: that of the first rank that has one, on all.
        """
        if self.count == 1:
            return work()
        result, error = None, None
        try:
            result = work()
        except InputError as caught:
            error = caught
        told: list[InputError | None] = [None] * self.count
        dist.all_gather_object(told, error)
        for rank, other in enumerate(told):
            if other is not None:
                if not self.first:
                    raise ToldByFirst(str(other))
                raise other if rank == 0 else InputError(f"on rank {rank}: {other}", parameter=other.parameter)
        return cast(Result, result)

    def check_same(self, value: object, what: str) -> None:
        """Check that all ranks have the same.

        Raises:
            InputError: one has another value than the first; raised on all.
        """
        if self.count > 1:
            theirs: list[object] = [None] * self.count
            dist.all_gather_object(theirs, value)
            odd = next((rank for rank, other in enumerate(theirs) if other != theirs[0]), None)
            if odd is not None:
                text = f"the {what} of rank {odd} are others than those of rank 0; give all ranks the same"
                raise InputError(text, parameter=what) if self.first else ToldByFirst(text)

    def part(self, batch: Batch) -> Share:
        """Return this rank's part of a batch that all ranks have.

        A rank for which no example is left, in the last batch of an epoch, gets one that does not count.
        """
        inputs, targets = batch
        examples = inputs.shape[0]
        if self.count == 1:
            return Share(batch, examples)
        part = inputs.tensor_split(self.count)[self.rank], targets.tensor_split(self.count)[self.rank]
        mine = part[0].shape[0]
        return Share(part if mine else (inputs[:1], targets[:1]), examples, self.count * mine / examples)

    @property
    def sharded(self) -> bool:
        """Whether each rank stores a part of the model only."""
        return self.count > 1 and self.strategy == "fsdp2"

    def parallel(self, model: nn.Module) -> nn.Module:
        """Return the module to compute with in training, which averages gradients over the ranks.

        By fsdp2 it is the model, sharded in place, block by block of those that it holds in lists.
        """
        if self.count == 1:
            return model
        if self.sharded:
            # FSDP2 takes no parameters with channels last
            model = model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
            mesh = init_device_mesh(next(model.parameters()).device.type, (self.count,))
            lists = [module for module in model.modules() if isinstance(module, (nn.ModuleList, nn.Sequential))]
            for block in (child for module in lists for child in module.children() if [*child.children()]):
                if not isinstance(block, (nn.ModuleList, nn.Sequential)):
                    fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
            return model
        # Statistics of norm layers stay each rank's own, as those of its part of a batch are; the first rank's count.
        new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters  # since PyTorch 2.13
        options: dict[str, Any] = {"forward_sync_buffers" if new else "broadcast_buffers": False}
        return DistributedDataParallel(model, **options)

    @torch.no_grad()
    def load_(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Overwrite the parameters and buffers of a model with those of the first rank's state.

        Args:
            model: on all ranks, whole or sharded.
            state: on the first rank; on the others tensors of the same shapes.
        """
        for name, mine in model.state_dict().items():
            full = state[name].to(mine.device)
            local(mine).copy_(local(sharded_as(mine, self.ranks.from_first(full))))
        refresh_(model)


def gathered(value: Any) -> Any:
    """Return a state with its tensors whole, those that are sharded on the CPU; all ranks must call this."""
    if isinstance(value, OrderedDict):  # a state dict
        tensors: dict[str, Any] = {key: gathered(entry) for key, entry in value.items()}
        return with_metadata(tensors, metadata_of(value))
    if isinstance(value, dict):
        return {key: gathered(entry) for key, entry in value.items()}
    return whole(value).cpu() if isinstance(value, Tensor) and is_sharded(value) else value


ALONE = World()


@contextmanager
def unsynchronised(model: nn.Module) -> Iterator[None]:
    """Accumulate gradients without averaging them over ranks."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)
    else:
        with model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext():
            yield


def launched() -> World:
    """Return which process this is of those that a launcher such as ``torchrun`` started, by its environment."""
    count, rank, local = (os.environ.get(name, "") for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"))
    if not (count.isdecimal() and rank.isdecimal() and int(count) > 1):
        return ALONE
    return World(int(rank), int(count), int(local) if local.isdecimal() else 0)


@contextmanager
def joined(launch: Launch, device: str | None) -> Iterator[World]:
    """Join the processes that a launcher started in one process group; alone there is none.

    Args:
        launch: how they train together.
        device: of the training; None for CUDA where there is one.

    Raises:
        LostRank: another process has ended, or does not answer.
    """
    world = launched()
    if world.count == 1:
        yield world
        return
    on_gpu = torch.cuda.is_available() and device != "cpu"
    if on_gpu:
        torch.cuda.set_device(world.local)
    patience = min(ROLL_CALL, launch.timeout / 10)
    store = None
    try:
        store, *_ = next(rendezvous("env://", timeout=timedelta(seconds=launch.timeout)))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            timeout=timedelta(seconds=launch.timeout - patience),
            store=store,
            rank=world.rank,
            world_size=world.count,
        )
        yield replace(world, strategy=launch.strategy)
    except Exception as error:
        if not isinstance(error, dist.DistError) and "/gloo/" not in str(error):
            raise
        lost = lost_ranks(world, store, patience)
        names = f"{'rank' if len(lost) == 1 else 'ranks'} {', '.join(map(str, lost))}" if lost else "another rank"
        raise LostRank(
            f"{names} {'have' if len(lost) > 1 else 'has'} ended, or not answered for {launch.timeout:g} seconds"
        ) from error
    dist.destroy_process_group()  # not after an error, whose traceback holds what needs the group


def lost_ranks(world: World, store: Any, patience: float) -> list[int]:
    """Return the other ranks that do not say that they have lost one, too.

    Args:
        world: this one.
        store: by which they say it; None before there is one.
        patience: seconds that they have.
    """
    silent = {*range(world.count)} - {world.rank}

    def call() -> None:
        with suppress(Exception):  # of a store whose process has ended; then nobody can say anything
            store.set(f"lost/{world.rank}", "")
            while silent:
                silent.difference_update([rank for rank in silent if store.check([f"lost/{rank}"])])
                time.sleep(0.05)

    if store is not None:
        # in a thread that may stay behind: a store on a machine that has vanished holds up whoever asks it
        caller = Thread(target=call, daemon=True)
        caller.start()
        caller.join(patience)
    return sorted(silent)
