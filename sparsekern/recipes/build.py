"""The two networks of a run: the recipe's dense one, and the same with sparse layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import sparsekern as sk
from sparsekern.recipes.catalogue import find
from sparsekern.recipes.config import Config
from sparsekern.topology import generator_for


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
            config.sparsity,
            config.block_size,
            ignore=recipe.kept_dense,
            distribution=recipe.distribution,
            seed=seed,
        )
    if recipe.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model
