"""The run that a configuration and its data decide: everything looked up, nothing left open."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sparsekern.errors import InputError
from sparsekern.lab.config import Config
from sparsekern.lab.distributed import ALONE, Ranks
from sparsekern.lab.options import STOP, part_of
from sparsekern.lab.recipes import Recipe, find
from sparsekern.lab.tasks import Task
from sparsekern.training import METHODS, PRESETS, VRPGE, Gradual, Method


@dataclass(frozen=True)
class Run:
    """A run in which everything is decided: what the training reads, and needs to look up or parse no more.

    Attributes:
        config: the options, none of them open. ``config.json`` holds them.
        recipe: how the network is trained.
        task: what it is trained on, with the data, on the device.
        device: of the training.
        batches: steps of an epoch.
        steps: steps of the whole training.
        method: class of the training method.
        arguments: of its constructor, but for model, optimizer and seed.
        network: options of the network, but for its width.
        sparsity: of all sparse layers, or of those whose names match a glob.
        dtype: in which autocast computes, or None for a training without it.
        pool: blocks to store for each one that is to remain; None if the method does not choose among candidates.
        initial_sparsity: of the sparse layers before blocks go, or None for that of the end.
        agent: arguments of AGENT, or None for a training without it.
        layers: arguments of :func:`sparsekern.sparsify_`, but for sparsity, blocks and what stays dense.
        transform: name of the Sparse-IFT transform, or None.
        transform_max_gib: GiB that it may take, or None for its default.
        spectral: whether the graphs of the blocks are measured at each update.
        ranks: the processes that train it together.
    """

    config: Config
    recipe: Recipe
    task: Task
    device: torch.device
    batches: int
    steps: int
    method: type[Method]
    arguments: Mapping[str, Any]
    network: Mapping[str, Any]
    sparsity: float | Mapping[str, float]
    dtype: torch.dtype | None
    pool: float | None
    initial_sparsity: float | None
    agent: Mapping[str, Any] | None
    layers: Mapping[str, Any]
    transform: str | None
    transform_max_gib: float | None
    spectral: bool
    ranks: Ranks


def resolve(config: Config, task: Task, ranks: Ranks = ALONE) -> Run:
    """Decide a run.

    Args:
        config: the options, some of them open.
        task: with the data.
        ranks: the processes that train it together.

    Raises:
        ValueError: this machine lacks the device, the data do not fit the network, or the ranks do not divide a batch.
    """
    recipe, options = find(config.recipe), config.options
    if ranks.sharded and options.get("spectral"):
        raise InputError("spectral needs whole weights on each rank; drop it, or take --strategy ddp")
    config = config.resolved(task.examples, task.augmentation(recipe))
    device = usable_device(str(config.device), ranks)
    if config.batch_size % ranks.count:
        raise InputError(
            f"batch_size is {config.batch_size}, which {ranks.count} ranks do not divide; choose a multiple of "
            f"{ranks.count}, or another number of ranks",
            parameter="batch_size",
        )
    batches = math.ceil(task.examples / config.batch_size)
    steps = (config.epochs or 0) * batches
    chosen = None if config.preset is None else PRESETS[config.preset]
    method, options = METHODS[config.method], config.options
    arguments: dict[str, Any] = {"stop": (STOP if chosen is None else chosen.until) * steps}
    arguments |= {} if chosen is None else chosen.options
    arguments["update_every"] = config.update_every
    arguments |= part_of("method", options)
    if "stop" in options:
        arguments["stop"] = float(options["stop"]) * steps
    if "start" in options:
        arguments["start"] = int(float(options["start"]) * steps)
    layers = {"distribution": recipe.distribution} | ({} if chosen is None else dict(chosen.layers))
    layers |= part_of("recipe", options)
    pool, initial = layers.pop("pool", VRPGE.pool), layers.pop("initial_sparsity", None)
    if initial is None and issubclass(method, Gradual):
        initial = method.initial_sparsity
    agent, transform = part_of("agent", options), part_of("transform", options)
    if transform and issubclass(method, Gradual):
        raise InputError(
            f"transform is {transform['transform']}, which makes sparse layers as large as the sparsity allows, and "
            f"{config.method} begins with more blocks; choose another method",
            parameter="transform",
        )
    network, sparsity = {**recipe.network, **config.network}, config.sparsity
    if isinstance(sparsity, Mapping):
        sparsity = {recipe.kinds[kind]: number for kind, number in sparsity.items()}
        layers["targets"] = list(sparsity)
    elif recipe.kinds:
        layers["targets"] = list(recipe.kinds.values())
    return Run(
        config=config,
        recipe=recipe,
        task=task.prepared(recipe, network, str(config.augment), device),
        device=device,
        batches=batches,
        steps=steps,
        method=method,
        arguments=arguments,
        network=network,
        sparsity=sparsity,
        dtype=torch.bfloat16 if config.precision == "bfloat16" else None,
        pool=float(pool) if issubclass(method, VRPGE) else None,
        initial_sparsity=initial,
        agent={name.removeprefix("agent_"): v for name, v in agent.items()} if agent.pop("agent", False) else None,
        layers=layers,
        transform=transform.get("transform"),
        transform_max_gib=transform.get("transform_max_gib"),
        spectral=bool(options.get("spectral")),
        ranks=ranks,
    )


def usable_device(name: str, ranks: Ranks = ALONE) -> torch.device:
    """Return the device of that name; of several ranks on GPUs, each has its own.

    Raises:
        ValueError: this machine, or this installation of PyTorch, does not have it.
    """
    device = torch.device(name)
    if device.type == "cuda" and ranks.count > 1:
        if ":" in name:
            raise InputError(f"device is {name!r}, but each rank takes a GPU of its own; give cuda", parameter="device")
        device = torch.device("cuda", ranks.local)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device is {name!r}, but PyTorch sees {torch.cuda.device_count()} CUDA devices; use cpu",
            parameter="device",
        )
    return device
