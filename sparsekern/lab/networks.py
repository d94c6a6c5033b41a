"""The two networks of a run: the recipe's dense one, and the same with sparse layers; and what moves their blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import sparsekern as sk
from sparsekern.errors import InputError
from sparsekern.lab.config import STOP, Config
from sparsekern.lab.models.layers import widened
from sparsekern.lab.options import OPTIONS
from sparsekern.lab.recipes import find
from sparsekern.topology import generator_for
from sparsekern.training import AGENT, METHODS, PRESETS, Method, preset
from sparsekern.transforms import Width

SAME = Width()
"""The width of the dense network."""


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
        raise InputError(
            f"data has images of {height} x {width}; recipe {recipe.name} needs {side} x {side} or more: "
            "choose another",
            parameter="data",
        )
    fixed: dict[str, Any] = {"num_classes": classes, "in_channels": channels}
    if recipe.needs_image_size:
        fixed["image_size"] = (height, width)

    def dense(widen: Width = SAME) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator_for(seed, recipe.name).initial_seed())
            return recipe.model(**fixed, **_width(config, widen))

    transform = config.part("transform").get("transform")
    if network == "sparse" and transform is not None:
        model = _transformed(dense, str(transform), config, torch.empty(1, *image_shape), seed)
    else:
        model = dense()
        if network == "sparse":
            sk.sparsify_(
                model,
                _stored_sparsity(config),
                config.block_size,
                ignore=config.kept_dense,
                **({"distribution": recipe.distribution} | _layers(config)),
                seed=seed,
            )
    if recipe.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def _width(config: Config, widen: Width) -> dict[str, Any]:
    """Return the argument that makes the recipe's network as wide as the configuration says, widened."""
    if config.width is not None:
        return {"width": widen(config.width)}
    if widen == SAME:
        return {"width_multiplier": config.width_multiplier}
    return {"width_multiplier": lambda channels: widen(widened(channels, config.width_multiplier))}


def _transformed(
    dense: Callable[[Width], nn.Module], transform: str, config: Config, image: torch.Tensor, seed: int
) -> nn.Module:
    recipe = find(config.recipe)
    given = config.part("transform")
    if config.sparsity == 0:
        raise InputError(
            "sparsity is 0, which transform turns into the dense network: give one above 0", parameter="sparsity"
        )
    room: dict[str, Any] = {"max_gib": float(given["transform_max_gib"])} if "transform_max_gib" in given else {}
    try:
        return sk.transforms.transform(
            dense,
            transform,
            config.sparsity,
            image,
            block_size=config.block_size,
            ignore=config.kept_dense,
            distribution=recipe.distribution if transform == "wide" else "uniform",
            pool=_pool(config) or 1.0,
            seed=seed,
            **room,
        )
    except ValueError as error:  # it names its own argument, the user gave an option
        raise InputError(str(error).replace("max_gib", "transform_max_gib")) from None


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
    if (pool := _pool(config)) is not None:
        arguments["sparsity"] = config.sparsity
        if "transform" in config.part("transform"):  # the FLOPs decide what remains
            grids = [(layer.topology.elements(), layer.grid.numel) for layer in sk.sparse_layers(model).values()]
            arguments["sparsity"] = 1 - sum(n for n, _ in grids) / pool / sum(n for _, n in grids)
    for name, value in config.part("method").items():
        arguments[name] = float(value) * steps if OPTIONS[name].fraction else value
    if "start" in arguments:
        arguments["start"] = int(arguments["start"])
    if config.preset is not None:
        return preset(config.preset, model, optimizer, steps=steps, **arguments)
    return METHODS[config.method](model, optimizer, **({"stop": STOP * steps} | arguments))


def build_agent(config: Config, model: nn.Module, optimizer: torch.optim.Optimizer, method: Method) -> AGENT | None:
    """Return the AGENT of a run around its method; None if the run has none.

    Raises:
        ValueError: what AGENT raises.
    """
    options: dict[str, Any] = config.part("agent")
    if not options.get("agent"):
        return None
    arguments = {name.removeprefix("agent_"): value for name, value in options.items() if name != "agent"}
    try:
        return AGENT(model, optimizer, method=method, **arguments)
    except ValueError as error:
        if str(error).split()[0] in arguments:  # of its argument; the user gave an option
            raise InputError(f"agent_{error}") from None
        raise


def _layers(config: Config) -> dict[str, Any]:
    """Return arguments of :func:`sparsekern.sparsify_` that the preset, or an option, has for the sparse layers."""
    layers = {} if config.preset is None else dict(PRESETS[config.preset].layers)
    if "capacity" in config.part("recipe"):
        layers["capacity"] = config.part("recipe")["capacity"]
    return layers


def _pool(config: Config) -> float | None:
    """Return how many blocks are stored for each that is to remain; None for a method without a choice among them."""
    own = METHODS[config.method].pool
    return float(config.part("recipe").get("pool", own)) if own > 1 else None


def _stored_sparsity(config: Config) -> float:
    pool = _pool(config)
    return config.sparsity if pool is None else max(0.0, 1 - pool * (1 - config.sparsity))
