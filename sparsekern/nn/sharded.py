"""Values that FSDP2 has sharded into DTensors. Places are never sharded: every rank has all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
