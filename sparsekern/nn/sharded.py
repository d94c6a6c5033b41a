"""Values that FSDP2 has sharded by slots into DTensors; and the modules of a model that are under FSDP2 or DDP.

Places are not sharded: every rank has all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

GATHER = "gather them first, by get_model_state_dict with full_state_dict=True"
"""End of the errors of functions that take whole tensors: what to do first."""


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor, without importing ``torch.distributed``."""
    return hasattr(tensor, "device_mesh")


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor detached and, if it is sharded, gathered on every rank; all ranks must call this."""
    sharded: Any = tensor.detach()
    result: Tensor = sharded.full_tensor() if is_sharded(tensor) else sharded
    return result


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this rank holds: a view, whose writes go into the tensor."""
    sharded: Any = tensor
    part: Tensor = sharded.to_local() if is_sharded(tensor) else tensor
    return part


def own_rows(tensor: Tensor) -> Tensor | None:
    """Return which rows ``(n,)`` of a tensor this rank holds, in the order of its local part; None for all of them."""
    if not is_sharded(tensor):
        return None
    return local(sharded_as(tensor, torch.arange(tensor.shape[0], device=tensor.device)))


def own_slots(tensor: Tensor, slots: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return which of the given slots this rank holds.

    Args:
        tensor: ``(Z, ...)``.
        slots: ``(k,)`` int64.

    Returns:
        The rows ``(m,)`` of these in the local part, and their positions ``(m,)`` in ``slots``, or None if all are
        here. Synchronises the device if the tensor is sharded.
    """
    rows = own_rows(tensor)
    if rows is None:
        return slots, None
    row_of = slots.new_full((tensor.shape[0],), -1)
    row_of[rows] = torch.arange(rows.shape[0], device=rows.device)
    found = row_of[slots]
    here = (found >= 0).nonzero().squeeze(1)
    return found[here], here


@torch.no_grad()
def fill_slots_(tensor: Tensor, slots: Tensor, value: Any) -> None:
    """Fill some slots ``(k,)`` of a tensor ``(Z, ...)`` with a number or a tensor ``()``, in its local part."""
    local(tensor).index_fill_(0, own_slots(tensor, slots)[0], value)


@torch.no_grad()
def copy_slots_(tensor: Tensor, slots: Tensor, source: Tensor) -> None:
    """Copy ``source (k, ...)`` into some slots ``(k,)`` of a tensor ``(Z, ...)``, in its local part.

    ``source`` is the same on all ranks, or it is sharded as :func:`take_slots` does.
    """
    rows, here = own_slots(tensor, slots)
    local(tensor).index_copy_(0, rows, local(source) if here is None or is_sharded(source) else source[here])


@torch.no_grad()
def take_slots(tensor: Tensor, slots: Tensor) -> Tensor:
    """Return a copy ``(k, ...)`` of some slots ``(k,)`` of a tensor; if it is sharded, each stays on its rank."""
    # index_select copies whole slots, five times as fast as an index in brackets.
    return joined(local(tensor).index_select(0, own_slots(tensor, slots)[0]), tensor, slots.shape[0])


def joined(part: Tensor, like: Tensor, slots: int) -> Tensor:
    """Return the tensor ``(slots, ...)`` of which each rank gives its local part; the part if ``like`` is not sharded.

    It is sharded as ``like`` is.
    """
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    sharded: Any = like
    whole_tensor = part.new_empty(slots, *part.shape[1:], device="meta")
    return DTensor.from_local(
        part,
        sharded.device_mesh,
        sharded.placements,
        run_check=False,
        shape=whole_tensor.shape,
        stride=whole_tensor.stride(),
    )


def full_like_rows(like: Tensor, rows: int, value: float) -> Tensor:
    """Return a tensor ``(rows, ...)`` filled with a number, sharded as ``like`` is, with its other axes."""
    shape = (rows, *like.shape[1:])
    if not is_sharded(like):
        return torch.full(shape, value, dtype=like.dtype, device=like.device)
    from torch.distributed.tensor import full

    sharded: Any = like
    return full(shape, value, dtype=like.dtype, device_mesh=sharded.device_mesh, placements=sharded.placements)


def sharded_as(like: Tensor, tensor: Tensor) -> Tensor:
    """Return a whole tensor sharded as ``like`` is; unchanged if ``like`` is not sharded or ``tensor`` already is.

    Every rank passes the same numbers and keeps its own part: nothing is sent.
    """
    if not is_sharded(like) or is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    target: Any = like
    whole_tensor = tensor.detach().to(like.device)
    return distribute_tensor(whole_tensor, target.device_mesh, target.placements, src_data_rank=None)


def check_by_slots(values: Tensor, whose: str) -> None:
    """Raise NotImplementedError if values are sharded in another way than by slots.

    Args:
        values: ``(Z, bo, bi)``.
        whose: the layer's name, for the error.
    """
    if is_sharded(values) and not is_by_slots(values):
        placements = ", ".join(map(str, cast(Any, values).placements))
        raise NotImplementedError(
            f"values of {whose} are sharded as {placements}, and blocks move only where values are sharded by slots, "
            "as fully_shard does by itself: leave out shard_placement_fn and tensor-parallel plans"
        )


def is_by_slots(sharded: Any) -> bool:
    """Return whether each slot of a DTensor is whole on some rank, or on several."""
    from torch.distributed.tensor import Replicate, Shard

    return all(isinstance(p, Replicate) or (type(p) is Shard and p.dim == 0) for p in sharded.placements)


def refuse_sharded(
    layers: Mapping[str, nn.Module], instead: str = "moving sharded blocks is not supported, use DDP"
) -> None:
    """Raise NotImplementedError if the values of a layer are sharded, as after ``fully_shard``.

    Args:
        layers: sparse layers by name.
        instead: end of the message: what is not supported, and the way out.
    """
    for name, layer in layers.items():
        if is_sharded(layer.values):  # type: ignore[arg-type]
            raise NotImplementedError(f"values of {name!r} are a DTensor; {instead}")


def slot_scores(values: Tensor, measure: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a number ``(Z,)`` for each slot: computed from the values on this rank, and gathered from all shards.

    Args:
        values: ``(Z, bo, bi)``. If they are sharded, all ranks must call this.
        measure: returns a number ``(z,)`` for each of the blocks ``(z, bo, bi)`` that it is given.
    """
    return whole(joined(measure(local(values.detach())), values, values.shape[0]))


def sum_of_parts(tensor: Any, part: Tensor) -> Tensor:
    """Return the sum over shards of numbers ``(...)``, which each rank computed from its local part of ``tensor``."""
    if not is_sharded(tensor):
        return part
    from torch.distributed.tensor import DTensor, Partial, Replicate

    placements = [Partial() if p.is_shard() else Replicate() for p in tensor.placements]
    return whole(DTensor.from_local(part, tensor.device_mesh, placements, run_check=False))


def sharded_modules(model: nn.Module) -> list[Any]:
    """Return the modules of a model on which ``fully_shard`` was called.

    Raises:
        NotImplementedError: a module is in ``FullyShardedDataParallel``, the older form, which flattens parameters.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return []
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise NotImplementedError(
            "the model is in FullyShardedDataParallel, which flattens parameters, so that blocks cannot move; use "
            "torch.distributed.fsdp.fully_shard"
        )
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reshard(modules: Iterable[Any], layers: Mapping[str, nn.Module]) -> None:
    """Free the gathered copies of parameters, so that ``values`` of all layers are those that the optimizer holds.

    After a forward without a backward some are left: what is written into them is lost, and what is written into the
    shards is not seen by the next forward.

    Args:
        modules: those that :func:`sharded_modules` returned before the optimizer was built.
        layers: sparse layers by name.

    Raises:
        NotImplementedError: values are sharded by another means than ``fully_shard``, or not by slots.
    """
    for module in modules:
        module.reshard()
    for name, layer in layers.items():
        values: Any = layer.values
        if is_sharded(values) and not modules:
            raise NotImplementedError(
                f"values of {name!r} are a DTensor, but not by fully_shard before the method was built: call "
                "fully_shard on the model, then build the optimizer and the method; tensor-parallel plans are not "
                "supported"
            )
        check_by_slots(values, repr(name))


def parallel_modules(model: nn.Module) -> list[DistributedDataParallel]:
    """Return the DistributedDataParallel modules of a model, itself included."""
    return [module for module in model.modules() if isinstance(module, DistributedDataParallel)]


@contextmanager
def without_sync(model: nn.Module) -> Iterator[None]:
    """Accumulate gradients of DistributedDataParallel, if the model is or holds one, without any communication.

    The broadcast of buffers is left to the next pass too.
    """
    with ExitStack() as stack:
        for module in parallel_modules(model):
            stack.enter_context(module.no_sync())
            # no_sync makes the next forward skip its broadcast of buffers: restore the flag that says so.
            stack.callback(setattr, module, "require_forward_param_sync", module.require_forward_param_sync)
            module.require_forward_param_sync = False
        yield
