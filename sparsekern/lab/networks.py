"""The two networks of a run, the recipe's dense one and the same with sparse layers, and what moves their blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

import sparsekern as sk
from sparsekern.errors import InputError
from sparsekern.lab.models.layers import widened
from sparsekern.lab.resolved import Run
from sparsekern.topology import generator_for
from sparsekern.training import AGENT, Method
from sparsekern.transforms import Width

SAME = Width()
"""The width of the dense network."""


def build(run: Run, network: str, seed: int) -> nn.Module:
    """Return a network of a run, on the CPU.

    The seed alone decides the initial values: the global generator is left as it was. Both networks have the same dense
    layers; the values of sparse layers are drawn anew.

    Args:
        run: which network, how wide, how sparse.
        network: ``"sparse"`` or ``"dense"``.
        seed: see above.

    Raises:
        ValueError: the data do not fit the network, or the sparsity leaves a layer without a block.
    """
    recipe, config = run.recipe, run.config
    fixed = run.task.model_arguments()
    if not recipe.needs_image_size:
        fixed.pop("image_size", None)

    def dense(widen: Width = SAME) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator_for(seed, recipe.name).initial_seed())
            return recipe.model(**fixed, **run.network, **_width(run, widen))

    if network == "sparse" and run.transform is not None:
        model = _transformed(run, dense, seed)
    else:
        model = dense()
        if network == "sparse":
            sk.sparsify_(model, _stored(run), config.block_size, ignore=config.kept_dense, seed=seed, **run.layers)
    if recipe.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def _stored(run: Run) -> float | Mapping[str, float]:
    """Return the sparsity of what is stored, candidates and what is to go included."""
    pool, sparsity = run.pool, run.sparsity
    if run.initial_sparsity is not None:
        return run.initial_sparsity
    if pool is None:
        return sparsity
    if isinstance(sparsity, Mapping):
        return {glob: max(0.0, 1 - pool * (1 - number)) for glob, number in sparsity.items()}
    return max(0.0, 1 - pool * (1 - sparsity))


def _width(run: Run, widen: Width) -> dict[str, Any]:
    """Return the argument that makes the recipe's network as wide as the configuration says, widened."""
    config = run.config
    if config.width is not None:
        return {"width": widen(config.width)}
    if widen == SAME:
        return {"width_multiplier": config.width_multiplier}
    return {"width_multiplier": lambda channels: widen(widened(channels, config.width_multiplier))}


def _transformed(run: Run, dense: Callable[[Width], nn.Module], seed: int) -> nn.Module:
    config, name = run.config, str(run.transform)
    if isinstance(run.sparsity, Mapping):
        raise InputError(
            "sparsity is given by kind of layer, but transform takes one for all: give one number", parameter="sparsity"
        )
    if run.sparsity == 0:
        raise InputError(
            "sparsity is 0, which transform turns into the dense network: give one above 0", parameter="sparsity"
        )
    room: dict[str, Any] = {} if run.transform_max_gib is None else {"max_gib": run.transform_max_gib}
    try:
        return sk.transforms.transform(
            dense,
            name,
            run.sparsity,
            run.task.sample(),
            block_size=config.block_size,
            ignore=config.kept_dense,
            distribution=run.recipe.distribution if name == "wide" else "uniform",
            pool=run.pool or 1.0,
            seed=seed,
            **room,
        )
    except InputError as error:
        if error.parameter != "max_gib":
            raise
        raise InputError(str(error), parameter="transform_max_gib") from None


def build_method(run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> Method:
    """Return the method of a run.

    Args:
        run: names the method and its arguments.
        model: the sparse network.
        optimizer: holds its values.
        seed: decides which blocks move where.

    Raises:
        ValueError: an argument that the method refuses.
    """
    arguments = dict(run.arguments)
    if run.initial_sparsity is not None:
        arguments["final_sparsity"] = run.sparsity
    if run.pool is not None:
        arguments["sparsity"] = run.sparsity
        if run.transform is not None or isinstance(run.sparsity, Mapping):  # what is stored says how much remains
            grids = [(layer.topology.elements(), layer.grid.numel) for layer in sk.sparse_layers(model).values()]
            arguments["sparsity"] = 1 - sum(n for n, _ in grids) / run.pool / sum(n for _, n in grids)
    return run.method(model, optimizer, seed=seed, **arguments)


def build_agent(run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, method: Method) -> AGENT | None:
    """Return the AGENT of a run around its method; None if the run has none.

    Raises:
        ValueError: an argument that AGENT refuses. Its ``parameter`` is the name of the run's option.
    """
    if run.agent is None:
        return None
    try:
        return AGENT(model, optimizer, method=method, **run.agent)
    except InputError as error:
        if error.parameter not in run.agent:
            raise
        raise InputError(str(error), parameter=f"agent_{error.parameter}") from None
