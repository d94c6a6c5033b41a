"""The two networks of a run: the recipe's dense one, and the same with sparse layers; and what moves their blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import sparsekern as sk
from sparsekern.recipes.catalogue import find
from sparsekern.recipes.config import STOP, Config
from sparsekern.recipes.options import OPTIONS
from sparsekern.topology import generator_for
from sparsekern.training import METHODS, Method, preset


def build(network: str, config: Config, image_shape: tuple[int, int, int], classes: int, seed: int) -> nn.Module:
    """Return the network of a run by its name, ``"sparse"`` or ``"dense"``, on the CPU.

    The initial values are decided by the seed alone: the global generator is left as it was. The two networks have the
    same dense layers; the sparse ones are drawn anew.

    Args:
        network: the name.
        config: names the recipe, its width, sparsity and blocks.
        image_shape: ``(C, H, W)``.
        classes: outputs.
        seed: see above.

    Raises:
        ValueError: the images are too small for the network or do not fit it; the sparsity leaves a layer without a
            block.
    """
    recipe = find(config.recipe)
    channels, height, width = image_shape
    if min(height, width) < recipe.smallest_image:
        side = recipe.smallest_image
        raise ValueError(
            f"data has images of {height} x {width}; recipe {recipe.name} needs {side} x {side} or more: choose another"
        )
    arguments: dict[str, Any] = {"num_classes": classes, "in_channels": channels}
    arguments |= {"width_multiplier": config.width_multiplier} if config.width is None else {"width": config.width}
    if recipe.needs_image_size:
        arguments["image_size"] = (height, width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator_for(seed, recipe.name).initial_seed())
        model = recipe.model(**arguments)
    if network == "sparse":
        sk.sparsify_(
            model,
            _stored_sparsity(config),
            config.block_size,
            ignore=recipe.kept_dense,
            distribution=recipe.distribution,
            seed=seed,
        )
    if recipe.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def build_method(config: Config, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> Method:
    """Return the method of a run.

    Args:
        config: resolved; names the method or the preset, and the options.
        model: the sparse network.
        optimizer: holds its values.
        steps: optimizer steps of the whole training.
        seed: decides which blocks move where.

    Raises:
        ValueError: what the method raises.
    """
    arguments: dict[str, Any] = {"update_every": config.update_every, "seed": seed}
    if _pool(config) is not None:
        arguments["sparsity"] = config.sparsity
    for name, value in config.part("method").items():
        arguments[name] = float(value) * steps if OPTIONS[name].fraction else value
    if "start" in arguments:
        arguments["start"] = int(arguments["start"])
    if config.preset is not None:
        return preset(config.preset, model, optimizer, steps=steps, **arguments)
    return METHODS[config.method](model, optimizer, **({"stop": STOP * steps} | arguments))


def _pool(config: Config) -> float | None:
    """Return how many blocks are stored for each that is to remain; None for a method without a choice among them."""
    own = METHODS[config.method].pool
    return float(config.part("recipe").get("pool", own)) if own > 1 else None


def _stored_sparsity(config: Config) -> float:
    pool = _pool(config)
    return config.sparsity if pool is None else max(0.0, 1 - pool * (1 - config.sparsity))
