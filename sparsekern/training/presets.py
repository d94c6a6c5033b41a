"""The papers' values, by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparsekern.training.base import Method
from sparsekern.training.gse import GSE
from sparsekern.training.rigl import RigL
from sparsekern.training.set import SET
from sparsekern.training.vrpge import VRPGE


@dataclass(frozen=True)
class Preset:
    """A method with the values of one publication.

    Attributes:
        method: the class.
        until: fraction of the training after which no block moves; None: to the end, without the cosine. The methods'
            cosine ends there.
        options: its arguments.
        source: where they are from.
    """

    method: type[Method]
    until: float | None
    options: dict[str, Any]
    source: str


# What has a probability is a filter; nothing is stored anew, for all filters are stored at the start.
_VRPGE = {
    "group": "row",
    "masks": 2,
    "structure_every": 1,
    "probability_rate": 12e-3,
    "probability_optimizer": "adam",
    "score_clip": 3.0,
    "floor": 0.0,
    "refill": 0.0,
    "scope": "global",
    "costs": "units",
    "weight_step": "one",
}
_GSE = {"update_every": 1000, "drop_fraction": 0.2, "scope": "global", "with_replacement": True}

PRESETS = {
    "set": Preset(SET, None, {"drop_fraction": 0.3}, "Mocanu et al. 2018: 30 %, after every epoch (give update_every)"),
    "rigl": Preset(
        RigL,
        0.75,
        {"update_every": 100, "drop_fraction": 0.3, "regrow": True, "skip_step": True},
        "Evci et al. 2020: ResNet-50 and Wide ResNet",
    ),
    "rigl-sparse-ift": Preset(
        RigL,
        0.75,
        {"update_every": 100, "drop_fraction": 0.3, "regrow": True},
        "Thangarasa et al. 2023, Sparse-IFT: CIFAR and ImageNet; unlike RigL's own code no step is skipped",
    ),
    "rigl-sparse-ift-gpt": Preset(
        RigL,
        0.8,
        {"update_every": 500, "drop_fraction": 0.3, "regrow": True},
        "Thangarasa et al. 2023, Sparse-IFT: GPT",
    ),
    "gse": Preset(GSE, 0.6, _GSE, "Heddes et al. 2024, the authors' code for CIFAR: uniform, the recommended one"),
    "gse-grabo": Preset(GSE, 0.6, _GSE | {"distribution": "grabo"}, "Heddes et al. 2024: guided by bounds"),
    "gse-graest": Preset(GSE, 0.6, _GSE | {"distribution": "graest"}, "Heddes et al. 2024: guided by estimates"),
    "gse-imagenet": Preset(
        GSE,
        0.6,
        _GSE | {"subset_factor": 2.0},
        "Heddes et al. 2024: ImageNet's subset factor; the rest is CIFAR's, ImageNet's is not published",
    ),
    "vrpge": Preset(VRPGE, 300 / 340, _VRPGE, "Zhou et al. 2021: 300 epochs, then 40 with the chosen filters"),
    "vrpge-code": Preset(
        VRPGE,
        300 / 340,
        _VRPGE | {"weight_step": "all", "unsampled": "decay"},
        "Zhou et al. 2021, the released code: a backward for every mask, momentum and decay for every weight",
    ),
}


def preset(name: str, model: nn.Module, optimizer: torch.optim.Optimizer, *, steps: int, **options: Any) -> Method:
    """Return a method with the values of a publication.

    Args:
        name: a key of :data:`PRESETS`, which says what the values are and where they are from.
        model, optimizer: as for :class:`Method`.
        steps: optimizer steps of the whole training.
        options: arguments that differ, such as ``update_every`` or ``allow_dense_scores``; of VR-PGE ``sparsity``.

    Raises:
        ValueError: an unknown name, or what the method raises.

    Example:
        >>> model = sk.sparsify_(nn.Sequential(nn.Linear(64, 64)), sparsity=0.75, block_size=16)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> sk.preset("gse", model, optimizer, steps=10_000)
        GSE(1 layers, update_every=..., start=..., stop=..., step 0, 0 updates)
    """
    if name not in PRESETS:
        raise ValueError(f"preset is {name!r}; it must be one of {', '.join(PRESETS)}")
    chosen = PRESETS[name]
    stop = None if chosen.until is None else chosen.until * steps
    return chosen.method(model, optimizer, **({"stop": stop} | chosen.options | options))
