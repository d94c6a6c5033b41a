"""Presets: methods with the hyper-parameters of publications, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sparsekern.errors import InputError
from sparsekern.topology.arguments import check_choice, check_whole
from sparsekern.training.base import Method
from sparsekern.training.growth import GSE, GraNet, RigL
from sparsekern.training.magnitude import SET
from sparsekern.training.vrpge import VRPGE


@dataclass(frozen=True)
class Preset:
    """A method with the hyper-parameters of a publication.

    Attributes:
        method: the class.
        until: fraction of the training after which no block moves, where the cosine of the method ends.
        options: arguments of the class.
        source: the publication.
        layers: arguments of :func:`sparsekern.sparsify_` for layers like those of the publication, where they matter to
            the method: ``sk.sparsify_(model, 0.9, 1, **PRESETS["gse"].layers)``. The method works without them, but
            layers compete with ``scope="global"`` only if ``capacity`` gives them free slots.
        dense: the layers that stay dense: ``"ends"``, the first and the last; ``"first"``; or ``"none"``.
        once_an_epoch: whether there is an update after every epoch, so that ``update_every`` must be given.
    """

    method: type[Method]
    until: float
    options: dict[str, Any]
    source: str
    layers: Mapping[str, Any] = field(default_factory=dict)
    dense: str = "ends"
    once_an_epoch: bool = False


# A unit is a filter. No refills, for all filters are stored from the start.
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
# All layers are sparse, with initial variance 1 / fan_in; a layer may gain a quarter of its blocks.
_GSE_LAYERS = {"distribution": "er-matrix", "init_scale": 3**0.5, "capacity": 1.25, "stems": True}
# Their code counts steps from 0: the first update follows the first batch.
_EVCI = {"update_every": 100, "drop_fraction": 0.3, "offset": 1}

# All weights but those of norms and biases are sparse.
_ERK = {"distribution": "erk", "stems": True}
_ITOP = {"drop_fraction": 0.5}
_LIU = "Liu et al. 2021 (ITOP): CIFAR, 250 epochs of 128 images"


def _gse(source: str, **options: Any) -> Preset:
    return Preset(GSE, 0.6, _GSE | options, f"Heddes et al. 2024{source}", _GSE_LAYERS, "none")


PRESETS = {
    "set-mocanu": Preset(
        SET,
        1.0,
        {"drop_fraction": 0.3, "anneal": "constant", "drop": "signs", "grown_values": "random"},
        "Mocanu et al. 2018, SET's own paper: 30 % of each sign, after every epoch but the last",
        dense="none",
        once_an_epoch=True,
    ),
    "set-rigl": Preset(SET, 0.75, _EVCI, "SET as Evci et al. 2020 (RigL) compare it", dense="first"),
    "rigl": Preset(
        RigL,
        0.75,
        _EVCI | {"regrow": True, "skip_step": True},
        "Evci et al. 2020: ResNet-50 and Wide ResNet",
        dense="first",
    ),
    "set-itop": Preset(SET, 1.0, _ITOP | {"update_every": 1500}, f"{_LIU}, SET-ITOP", _ERK, "none"),
    "rigl-itop": Preset(RigL, 1.0, _ITOP | {"update_every": 4000, "regrow": True}, f"{_LIU}, RigL-ITOP", _ERK, "none"),
    "granet": Preset(
        GraNet,
        110 / 160,
        {"update_every": 1000, "drop_fraction": 0.5},
        "Liu et al. 2021 (GraNet): CIFAR, from half of the weights; 160 epochs, 110 of them with pruning",
        _ERK,
        "none",
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
    "gse": _gse(", the authors' code for CIFAR: uniform, the recommended one"),
    "gse-grabo": _gse(": guided by bounds", distribution="grabo"),
    "gse-graest": _gse(": guided by estimates", distribution="graest"),
    "gse-imagenet": _gse(
        ": ImageNet's subset factor; the rest is CIFAR's, ImageNet's is not published", subset_factor=2.0
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
    """Return a method with the hyper-parameters of a publication.

    The layers of the model are not changed; :data:`PRESETS` says how a publication builds them (``layers``, ``dense``).
    ``docs/methods.md`` lists the differences of each method from its publication.

    Args:
        name: a key of :data:`PRESETS`.
        model, optimizer: as for :class:`Method`.
        steps: optimizer steps of the whole training.
        options: arguments of the method that differ, such as ``update_every`` or ``allow_dense_scores``, or
            ``sparsity`` of VR-PGE.

    Raises:
        TypeError: ``steps`` is not a whole number.
        ValueError: the name is unknown, ``steps`` is below 1, ``update_every`` is missing where it is the number of
            steps of an epoch, or what the method raises.

    Example:
        >>> layers = sk.training.PRESETS["gse"].layers
        >>> model = sk.sparsify_(nn.Sequential(nn.Linear(64, 64)), sparsity=0.75, block_size=16, **layers)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> sk.preset("gse", model, optimizer, steps=10_000)
        GSE(1 layers, update_every=..., start=..., stop=..., step 0, 0 updates)
    """
    check_choice("preset", name, PRESETS)
    check_whole("steps", steps, 1, ", the optimizer steps of the whole training")
    chosen = PRESETS[name]
    if chosen.once_an_epoch and "update_every" not in options:
        raise InputError(
            f"update_every is missing: {name} updates after every epoch; give the optimizer steps of one epoch",
            parameter="update_every",
        )
    values = {"stop": chosen.until * steps} | chosen.options
    if callable(options.get("drop_fraction")):
        values.pop("anneal", None)  # for a number only
    return chosen.method(model, optimizer, **(values | options))
