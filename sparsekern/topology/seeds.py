"""Random numbers that depend on a seed and a name, and on nothing else: not on the device, the rank or the order."""

from __future__ import annotations

import hashlib

import torch

from sparsekern.topology.arguments import check_whole


def generator_for(seed: int, *names: str | int) -> torch.Generator:
    """Return a CPU generator for what ``names`` say, such as a layer and a purpose.

    All random decisions of the package are drawn on the CPU, so that every device and every rank takes the same.

    Raises:
        TypeError: the seed is no whole number.
    """
    check_whole("seed", seed)
    digest = hashlib.sha256(repr((int(seed), *names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
