"""Values that FSDP2 has sharded by slots into DTensors. Places are not sharded: every rank has all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

GATHER = "gather them first, by get_model_state_dict with full_state_dict=True"
"""Way out for functions that take whole tensors."""


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
    """Return the part of a tensor that this rank holds; a write into it, without gradients, is one into the tensor."""
    sharded: Any = tensor
    part: Tensor = sharded.to_local() if is_sharded(tensor) else tensor
    return part


def own_rows(tensor: Tensor) -> Tensor | None:
    """Return the positions ``(n,)``, on the first axis of a tensor, of the rows of its local part; None for all."""
    if not is_sharded(tensor):
        return None
    return local(sharded_as(tensor, torch.arange(tensor.shape[0], device=tensor.device)))


def own_slots(tensor: Tensor, slots: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return which of some slots are in the local part of a tensor.

    Args:
        tensor: ``(Z, ...)``.
        slots: ``(k,)`` int64.

    Returns:
        Their rows ``(m,)`` in the local part, and the positions ``(m,)`` in ``slots`` of those that are there, or None
        for all. Synchronises the device if the tensor is sharded.
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
    return joined(local(tensor)[own_slots(tensor, slots)[0]], tensor, slots.shape[0])


def joined(part: Tensor, like: Tensor, slots: int) -> Tensor:
    """Return the tensor ``(slots, ...)`` with this local part, sharded as ``like`` is; the part if that is not."""
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
