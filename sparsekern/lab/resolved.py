"""The run that a configuration and its data decide: everything looked up, nothing left open."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import sparsekern as sk
from sparsekern.errors import InputError
from sparsekern.lab.config import Config
from sparsekern.lab.distributed import ALONE, World
from sparsekern.lab.language import Language
from sparsekern.lab.models.layers import widened
from sparsekern.lab.options import STOP, part_of
from sparsekern.lab.recipes import Recipe, find
from sparsekern.lab.tasks import Batch, Task
from sparsekern.nn import sparse_layers
from sparsekern.topology import generator_for
from sparsekern.training import AGENT, METHODS, VRPGE, Gradual, Lottery, Method, TopKAST
from sparsekern.transforms import Width


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
        stored: sparsity of the layers as they are built, with candidates and the blocks that will go.
        pool: blocks to store for each one that is to remain; None if the method does not choose among candidates.
        agent: arguments of AGENT, or None for a training without it.
        layers: arguments of :func:`sparsekern.sparsify_`, but for sparsity, blocks and what stays dense.
        transform: name of the Sparse-IFT transform, and what else it is told; None without one.
        spectral: whether the graphs of the blocks are measured at each update.
        world: the processes that train it together.
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
    stored: float | Mapping[str, float]
    pool: float | None
    agent: Mapping[str, Any] | None
    layers: Mapping[str, Any]
    transform: Mapping[str, Any] | None
    spectral: bool
    world: World

    @property
    def rewind(self) -> int:
        """Steps of the first round after which the later ones begin; 0 where there is one round."""
        return int(self.arguments.get("rewind", 0))

    def order(self, seed: int, epoch: int, purpose: str = "order") -> Any:
        """Return the order of the examples in an epoch, which seed, epoch and purpose decide."""
        return self.task.order(generator_for(seed, purpose, epoch))

    def batch(self, order: Any, number: int, seed: int, epoch: int, purpose: str = "augment") -> Batch:
        """Return a batch of an epoch, as all ranks together take it; both networks get the same ones."""
        generator = generator_for(seed, purpose, epoch, number)
        return self.task.batch(order, number, self.config.batch_size, generator)


def resolve(config: Config, task: Task, world: World = ALONE) -> Run:
    """Decide a run.

    Args:
        config: the options, some of them open.
        task: with the data.
        world: the processes that train it together.

    Raises:
        ValueError: this machine lacks the device, the data do not fit the network, or the ranks do not divide a batch.
    """
    recipe, options = find(config.recipe), config.options
    if world.sharded and options.get("spectral"):
        raise InputError("spectral needs whole weights on each rank; drop it, or take --strategy ddp")
    config = config.resolved(task.examples, task.augmentation(recipe))
    device = usable_device(str(config.device), world)
    if config.batch_size % world.count:
        raise InputError(
            f"batch_size is {config.batch_size}, which {world.count} ranks do not divide; choose a multiple of "
            f"{world.count}, or another number of ranks",
            parameter="batch_size",
        )
    batches = math.ceil(task.examples / config.batch_size)
    steps = (config.epochs or 0) * batches
    chosen = config.publication
    method, options = METHODS[config.method], config.options
    arguments: dict[str, Any] = {"stop": (STOP if chosen is None else chosen.until) * steps}
    arguments |= {} if chosen is None else chosen.options
    arguments["update_every"] = config.update_every
    arguments |= part_of("method", options)
    if "stop" in options:
        arguments["stop"] = float(options["stop"]) * steps
    if "start" in options:
        arguments["start"] = int(float(options["start"]) * steps)
    layers: dict[str, Any] = {"distribution": recipe.distribution, "init_scale": recipe.init_scale}
    layers |= {} if chosen is None else chosen.layers
    layers |= part_of("recipe", options)
    pool = float(layers.pop("pool", method.pool)) if issubclass(method, (VRPGE, TopKAST)) else None
    initial = layers.pop("initial_sparsity", method.initial_sparsity if issubclass(method, Gradual) else None)
    agent, transform = part_of("agent", options), part_of("transform", options)
    if transform and issubclass(method, Gradual):
        raise InputError(
            f"transform is {transform['name']}, which makes sparse layers as large as the sparsity allows, and "
            f"{config.method} begins with more blocks; choose another method",
            parameter="transform",
        )
    if rewind := part_of("rewind", options):
        method, initial = Lottery, rewind.pop("from", 0.0)
        arguments = {"rewind": config.rewound(batches), "scope": "global"}
        arguments |= {name: value for name, value in rewind.items() if name != "name"}
        _check_rewind(config, world)
    network, sparsity = {**recipe.network, **config.network}, config.sparsity
    if isinstance(sparsity, Mapping):
        sparsity = {recipe.kinds[kind]: number for kind, number in sparsity.items()}
        layers["targets"] = list(sparsity)
    elif isinstance(recipe.sparsity, Mapping):
        layers["targets"] = [recipe.kinds[kind] for kind in recipe.sparsity]
    stored = _stored(sparsity, pool) if initial is None else initial
    if "score" in layers:
        layers = _scored(layers, config, stored)
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
        stored=stored,
        pool=pool,
        agent=agent if agent.pop("name", False) else None,
        layers=layers,
        transform=transform or None,
        spectral=bool(options.get("spectral")),
        world=world,
    )


def usable_device(name: str, world: World = ALONE) -> torch.device:
    """Return the device of that name; of several ranks on GPUs, each has its own.

    Raises:
        ValueError: this machine, or this installation of PyTorch, does not have it.
    """
    device = torch.device(name)
    if device.type == "cuda" and world.count > 1:
        if ":" in name:
            raise InputError(f"device is {name!r}, but each rank takes a GPU of its own; give cuda", parameter="device")
        device = torch.device("cuda", world.local)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device is {name!r}, but PyTorch sees {torch.cuda.device_count()} CUDA devices; use cpu",
            parameter="device",
        )
    return device


SAME = Width()
"""The width of the dense network."""

RANKED_TOGETHER = ("snip", "grasp", "synflow")
"""Scores whose publications rank the weights of all layers together, and that need a batch."""


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
            scored = "score" in run.layers
            # scores in float64 choose the same blocks on any number of threads, and SynFlow's do not overflow
            model = model.double() if scored else model
            sample = {"sample": _sample(run, model, seed)} if scored else {}
            arguments = {"ignore": config.kept_dense, "seed": seed, **sample, **run.layers}
            model = sk.sparsify_(model, run.stored, config.block_size, **arguments)
            model = model.float() if scored else model
    if recipe.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def build_shapes(run: Run, network: str, seed: int) -> nn.Module:
    """Return the network of :func:`build` on the meta device: layers and shapes, without data."""
    unscaled = replace(run, layers={**run.layers, "init_scale": 1.0})  # meta weights have no scale of their own
    with torch.device("meta"):
        return build(unscaled, network, seed)


def build_places(run: Run, network: str, seed: int) -> nn.Module:
    """Return the network of :func:`build` with its blocks in their places, all of them zero.

    A score and a transform read the values of the dense network: networks with one are built whole.
    """
    if run.transform is not None or "score" in run.layers:
        return build(run, network, seed)
    model = build_shapes(run, network, seed).to_empty(device="cpu")
    with torch.no_grad():
        for layer in sparse_layers(model).values():
            layer.values.zero_()  # methods that rank blocks check that they are finite
    return model


def _check_rewind(config: Config, world: World) -> None:
    """Raise ValueError if lottery tickets cannot be trained with what else is asked for."""
    for name in ("agent", "transform"):
        if config.options.get(name):
            raise InputError(
                f"rewind is {config.options['rewind']}, with which {name} does not go: its layers would lose slots; "
                "drop one of them",
                parameter="rewind",
            )
    for name in ("start", "stop", "offset"):
        if name in config.options:
            raise InputError(
                f"{name} is {config.options[name]}, but with rewind blocks go between rounds only; drop the option",
                parameter=name,
            )
    if config.options["rewind"] == 1:
        raise InputError("rewind is 1, which leaves nothing to train; give a fraction below 1", parameter="rewind")
    if world.count > 1:
        raise InputError(
            f"rewind trains in one process, and here are {world.count} ranks; start it without torchrun",
            parameter="rewind",
        )


def _stored(sparsity: float | Mapping[str, float], pool: float | None) -> float | Mapping[str, float]:
    """Return the sparsity of what is stored of so many candidates for each block that is to remain."""
    if pool is None:
        return sparsity
    if isinstance(sparsity, Mapping):
        return {glob: max(0.0, 1 - pool * (1 - number)) for glob, number in sparsity.items()}
    return max(0.0, 1 - pool * (1 - sparsity))


def _scored(layers: Mapping[str, Any], config: Config, stored: float | Mapping[str, float]) -> dict[str, Any]:
    """Return the arguments of layers that start from a score, without those of layers whose values are drawn.

    Raises:
        ValueError: the score has no effect.
    """
    score, why = layers["score"], None
    if config.options.get("transform"):
        why = "transform draws the blocks of the layers that it makes"
    elif not any(stored.values() if isinstance(stored, Mapping) else [stored]):
        why = f"method {config.method} begins with all blocks at this sparsity"
    elif score == "synflow" and issubclass(find(config.recipe).task, Language):
        why = f"it needs an input of ones, which the tokens of recipe {config.recipe} are not"
    if why is not None:
        raise InputError(f"score is {score}, but {why}; drop the option", parameter="score")
    together = {"distribution": "global"} if score in RANKED_TOGETHER else {}
    return {name: value for name, value in layers.items() if name != "init_scale"} | together


def _sample(run: Run, model: nn.Module, seed: int) -> Callable[[], Tensor] | None:
    """Return the loss of the first batch of the training, or what SynFlow takes in its place; None for other scores."""
    score = run.layers["score"]
    if score not in RANKED_TOGETHER:
        return None
    inputs, targets = run.batch(run.order(seed, 0), 0, seed, 0)
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    batch = inputs.cpu(), targets.cpu()
    if score == "synflow":
        return lambda: model(torch.ones_like(batch[0][:1])).sum()
    return lambda: run.task.loss(model, batch)


def _width(run: Run, widen: Width) -> dict[str, Any]:
    """Return the argument that makes the recipe's network as wide as the configuration says, widened."""
    config = run.config
    if config.width is not None:
        return {"width": widen(config.width)}
    if widen == SAME:
        return {"width_multiplier": config.width_multiplier}
    return {"width_multiplier": lambda channels: widen(widened(channels, config.width_multiplier))}


def _transformed(run: Run, dense: Callable[[Width], nn.Module], seed: int) -> nn.Module:
    config, transform = run.config, dict(run.transform or {})
    if isinstance(run.sparsity, Mapping):
        raise InputError(
            "sparsity is given by kind of layer, but transform takes one for all: give one number", parameter="sparsity"
        )
    if run.sparsity == 0:
        raise InputError(
            "sparsity is 0, which transform turns into the dense network: give one above 0", parameter="sparsity"
        )
    try:
        return sk.transforms.transform(
            dense,
            sparsity=run.sparsity,
            sample_input=run.task.example()[0],
            block_size=config.block_size,
            ignore=config.kept_dense,
            distribution=run.recipe.distribution if transform["name"] == "wide" else "uniform",
            pool=run.pool or 1.0,
            seed=seed,
            **transform,
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
    if issubclass(run.method, Gradual):
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
