"""Values that FSDP2 has sharded: each rank holds a part of a DTensor. The places are whole on every rank.

Every rank calls these functions, and has the same numbers where a whole tensor is given.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor; asks without an import of ``torch.distributed``."""
    return hasattr(tensor, "device_mesh")


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with all its parts on every rank, or a plain one as it is; no gradient flows."""
    sharded: Any = tensor.detach()
    result: Tensor = sharded.full_tensor() if is_sharded(tensor) else sharded
    return result


def sharded_as(like: Tensor, tensor: Tensor) -> Tensor:
    """Return a whole tensor cut as ``like`` is: a DTensor if that is one.

    Nothing is sent: each rank takes its part. A tensor that is sharded already stays as it is.
    """
    if not is_sharded(like) or is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    target: Any = like
    whole_tensor = tensor.detach().to(like.device)
    return distribute_tensor(whole_tensor, target.device_mesh, target.placements, src_data_rank=None)
