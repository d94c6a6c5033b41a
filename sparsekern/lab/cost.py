"""The cost of a training, from a few of its steps or as a plan predicts it, and the account of a trained network."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from sparsekern.analysis import Summary, summary
from sparsekern.analysis.plan import Step, Updates
from sparsekern.analysis.summary import peak_above
from sparsekern.errors import InputError
from sparsekern.files import load_
from sparsekern.files.states import stored_layers
from sparsekern.files.weight_files import read_state
from sparsekern.lab.config import Config
from sparsekern.lab.language import Language
from sparsekern.lab.options import OPTIONS
from sparsekern.lab.recipes import find
from sparsekern.lab.resolved import Run, build, build_places, build_shapes, resolve
from sparsekern.lab.train import Learner
from sparsekern.nn import sparse_layers
from sparsekern.training import (
    AGENT,
    DSR,
    GSE,
    MEST,
    SET,
    VRPGE,
    Gradual,
    Lottery,
    Method,
    NetworkSampler,
    RigL,
    SRigL,
    TopKAST,
    compact_,
)

PERIOD = 4
"""Steps between updates while counting: room for two steps of probes and one without."""

LONG = 10**6
"""Epochs of a training that is not near its end, and steps to an update that does not come."""


def training_cost(run: Run, network: str) -> dict[str, int]:
    """Return ``training_flops`` and ``peak_bytes`` of a network of seed 0, from a few steps of copies made for it.

    FLOPs are those of all matrix products of the whole training, at stored elements: forward, backward, the scores of
    updates, and what changes when no block moves any more. Memory is that of an update's period: what is held between
    steps and what a step holds above that; the scratch of native kernels comes on top.

    Args:
        run: the training.
        network: ``"sparse"`` or ``"dense"``.
    """
    if network == "sparse" and "score" in run.layers:  # scored here, for all copies
        scored = {name: layer.topology for name, layer in sparse_layers(build(run, network, 0)).items()}
        run = _unscored(run, {name: 1 - places.blocks() / places.grid.cells for name, places in scored.items()})
    options = run.config.options
    without_agent = {name: value for name, value in options.items() if OPTIONS[name].part != "agent"}
    real = _long(run, network, options=without_agent, epochs=run.config.epochs)
    steps, period = real.total_steps, max(PERIOD, int(options.get("structure_every", 1)))
    usual = _flops(_long(run, network, options=without_agent, update_every=LONG // 2), period) / period
    moving = _long(run, network, options=without_agent, update_every=period)
    agent = None if run.agent is None else Learner(run, network, 0, build_places).agent
    if real.method is None:
        flops = usual * steps
    elif isinstance(real.method, Lottery):
        flops = _lottery_flops(real.method, steps, usual, _long(run, network, options=without_agent))
    elif isinstance(real.method, Gradual):
        ended = _long(run, network, options=without_agent, update_every=LONG // 2)
        flops = _gradual_flops(real.method, steps, usual, ended)
        updates = sum(real.method.schedule.due(step) for step in range(1, steps + 1))
        flops += max(0.0, _flops(moving, period) - usual * period) * updates
    else:
        schedule = real.method.schedule
        stop = min(steps, steps if schedule.stop is None else schedule.stop)
        updates = sum(schedule.due(step) for step in range(1, steps + 1))
        ended = _long(run, network, update_every=LONG, options={**without_agent, "start": 0, "stop": 0})
        _step(ended)
        after = _flops(ended, 1)
        extra = max(0.0, _flops(moving, period) - usual * period)
        if isinstance(real.method, MEST) and real.method.soft_bound:
            usual = _flops(moving, period) / period  # with what the first update has grown
        flops = usual * stop + after * (steps - stop) + extra * updates
        if agent is not None and agent.gamma > 0:
            begin = stop if isinstance(real.method, NetworkSampler) else 0
            flops += _agent_flops(agent, real, begin, after if begin else usual)
    if agent is not None:
        moving = _with_correction(run, network, period)
    _step(moving)  # the optimizer has its state after the first step
    gradients = sum(p.numel() * p.element_size() for p in moving.model.parameters() if p.requires_grad)
    between = moving.training_bytes() - gradients
    peak = between + peak_above(lambda: _run(moving, period), run.device)
    examples = run.task.examples
    flops *= examples / (run.batches * min(examples, run.config.batch_size))  # the last batch may be smaller
    return {"training_flops": round(flops), "peak_bytes": peak}


def _gradual_flops(method: Gradual, steps: int, first: float, learner: Learner) -> float:
    """Return the FLOPs of a training in which blocks go, ``first`` a step in the beginning.

    Args:
        method: says when how many go.
        steps: of the training.
        first: see above.
        learner: of the same network; its blocks go at once.
    """
    pruned = learner.method
    assert isinstance(pruned, Gradual)
    pruned.steps = LONG**2  # past its end
    pruned.move(lambda fraction: Gradual.choose_all(pruned, fraction))
    pruned.steps = 0  # and far from an update
    last = _flops(learner, 1)
    flops, left = 0.0, 1.0
    for step in range(1, steps + 1):
        flops += last + (first - last) * left
        if method.schedule.due(step):
            left = (1 - method.schedule.progress(step)) ** 3
    return flops


def _lottery_flops(method: Lottery, steps: int, first: float, learner: Learner) -> float:
    """Return the FLOPs of all rounds of a training of ``steps``, ``first`` a step in the first round.

    Args:
        method: says how many rounds there are.
        steps, first: see above.
        learner: of the same network; its blocks go at once.
    """
    pruned = learner.method
    assert isinstance(pruned, Lottery)

    def blocks() -> int:
        return sum(layer.topology.blocks() for layer in pruned.layers.values())

    before, pruned.round = blocks(), method.rounds - 1
    pruned.move(pruned.choose_all)
    after, last = blocks(), _flops(learner, 1)
    flops = first * steps
    for pruned.round in range(1, method.rounds):
        left = (pruned.blocks_left(before, after) - after) / max(1, before - after)
        flops += (last + (first - last) * left) * (steps - method.rewind)
    return flops


def _agent_flops(agent: AGENT, learner: Learner, begin: int, step: float) -> float:
    """Return the FLOPs of AGENT's passes if c is never 0 but in the first interval.

    Args:
        agent: says which passes there are.
        learner: says how many steps, and what a forward pass costs.
        begin: the first step at which AGENT may take part.
        step: FLOPs of a forward and backward on a batch.
    """
    if agent.every is not None:
        return step * (learner.total_steps - begin)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        learner.loss(learner.next_batch())
    snapshots = sum(first >= begin for first in range(0, learner.total_steps, learner.batches))
    compares = agent.estimate == "losses"
    epochs = snapshots - compares if snapshots else 0
    batches = min(learner.batches, agent.batches or learner.batches)
    passes = batches * (step * snapshots + int(counter.get_total_flops()) * max(0, snapshots - 1) * compares)
    return passes + step * learner.batches * epochs


def _with_correction(run: Run, network: str, period: int) -> Learner:
    """Return a learner whose AGENT passes over one batch only, and corrects from the first step."""
    learner = _long(run, network, update_every=period, options={**run.config.options, "agent_batches": 1})
    assert learner.agent is not None
    learner.agent.c = dict.fromkeys(learner.agent.c, 1.0)
    return learner


def _long(run: Run, network: str, **changes: Any) -> Learner:
    """Return a learner of another run on the same data, with as many blocks, that is far from its end."""
    longer = resolve(replace(run.config, **{"epochs": LONG, **changes}), run.task)
    return Learner(replace(longer, layers=run.layers, stored=run.stored), network, seed=0)


def _flops(learner: Learner, steps: int) -> int:
    with FlopCounterMode(display=False) as counter:
        _run(learner, steps)
    return int(counter.get_total_flops())


def _run(learner: Learner, steps: int) -> None:
    for _ in range(steps):
        _step(learner)


def _step(learner: Learner) -> None:
    """Take a step on a whole batch, and never look at the test images."""
    if (learner.batch + 1) * learner.run.config.batch_size > learner.task.examples:
        learner.epoch, learner.batch = learner.epoch + 1, 0
    learner.step()


def measure(config: Config, described: dict[str, Any], newest: Path, *, timed: bool) -> tuple[Summary, dict[str, Any]]:
    """Return the account of the sparse network, or the only one, and the sizes of each as ``results.json`` has them.

    The networks are built as for training and take a step on a batch of noise, so that the optimizer's state exists;
    then the sparse one gets the blocks of the checkpoint.

    Args:
        config: of the run.
        described: its data, as in ``config.json``.
        newest: a checkpoint of seed 0.
        timed: whether to time the layers, beside dense ones.

    Raises:
        ValueError: this machine lacks the device, or the checkpoint cannot be loaded.
    """
    run = resolve(replace(config, epochs=LONG), find(config.recipe).task.noise(described, config.batch_size))
    if "score" in run.layers:  # which had chosen by the data
        stored = stored_layers(read_state(newest / "sparse.safetensors")).values()
        slots = {layer.name: 1 - layer.topology.slots / layer.topology.grid.cells for layer in stored}
        run = _unscored(run, slots, "capacity")
    sizes = {}
    for network in reversed(config.networks):  # the sparse one last
        learner = Learner(run, network, seed=0)
        inputs, _ = learner.next_batch().batch
        learner.step()
        sizes[network] = learner.sizes()
    load_(learner.model, newest / f"{learner.network}.safetensors")
    if isinstance(learner.method, Gradual):  # what went since
        compact_(learner.model, learner.optimizer)
        sizes[learner.network] = learner.sizes()
    account = summary(learner.model, inputs, optimizer=learner.optimizer, measure=timed)
    return account, {name: sizes[name] for name in config.networks}


def _unscored(run: Run, sparsity: Mapping[str, float], *without: str) -> Run:
    """Return a run whose layers, by name, have these sparsities in places that are drawn, ``without`` some options."""
    layers = {name: value for name, value in run.layers.items() if name not in ("score", *without)}
    return replace(run, layers=layers | {"distribution": "uniform"}, stored=sparsity)


WIDTHS = 8
"""A network without a width is scaled in eighths of its channels."""


@dataclass(frozen=True)
class Planned:
    """A run of a recipe that has no data yet.

    Attributes:
        config: of the run; its batch is that of all devices together.
        devices: that share the batch.
        image: channels and side of the images, of a recipe that takes images.
        classes: of the images.

    Raises:
        ValueError: AGENT, a transform of the network, a score or lottery tickets are on, of which no plan is made.
    """

    config: Config
    devices: int = 1
    image: tuple[int, int] = (3, 32)
    classes: int = 10

    def __post_init__(self) -> None:
        for name in ("agent", "transform", "score", "rewind"):
            if self.config.options.get(name, False) is not False:
                raise InputError(f"{name} is on, of which no plan is made; drop the option", parameter=name)

    def described(self) -> dict[str, Any]:
        """Return what ``config.json`` would say of the data."""
        if issubclass(find(self.config.recipe).task, Language):
            return {"train_bytes": 2**24, "held_out_bytes": 2**20}
        channels, side = self.image
        count = 1437 if (channels, side) == (1, 8) else 50_000  # of scikit-learn's digits, and of CIFAR
        return {"image_shape": [channels, side, side], "classes": self.classes, "train_images": count}

    def run(self, examples: int = 1) -> Run:
        """Return the run, on noise of that many examples; it has the steps of one on real data."""
        task, described = find(self.config.recipe).task, self.described()
        config = replace(self.config, device="cpu").resolved(task.examples_of(described))
        return resolve(config, task.noise(described, examples))

    def step(self, network: str) -> Step:
        """Return a pass of a device over its part of the batch.

        Args:
            network: ``"sparse"`` or ``"dense"``.

        Raises:
            ValueError: the recipe's network is not one of that width, or the sparsity leaves a layer without a block.
        """
        run, config = self.run(), self.config
        size = config.batch_size // self.devices // config.accumulate
        return Step(
            build_shapes(run, network, seed=0),
            tuple(_of_size(part, size, run.recipe.channels_last) for part in run.task.example()),
            run.task.loss,
            lambda model: run.recipe.optimizer.build(model, config.rate),
            run.recipe.clip_norm,
            run.dtype,
        )

    def updates(self) -> Updates:
        """Return what an update of the run's method computes and sends."""
        run = self.run()
        method, every = run.method, int(run.arguments["update_every"])

        def argument(name: str) -> Any:
            return run.arguments.get(name, _default(method, name))

        if issubclass(method, VRPGE):
            assert run.pool is not None
            forwards = (argument("masks") - 1) / argument("structure_every")
            return Updates(every=every, masked=1 / run.pool, trained=1 / run.pool, forwards=forwards)
        if issubclass(method, TopKAST):
            assert run.pool is not None
            moved = float(argument("drop_fraction")) * (1 - 1 / run.pool)
            return Updates(every=every, moved=moved, ranked=True, masked=1 / run.pool)
        if issubclass(method, Gradual):
            return Updates(every=every, ranked=True)
        if not issubclass(method, (SET, DSR, RigL, GSE)):
            return Updates()
        moved = float(argument("drop_fraction"))
        updates = Updates(every=every, moved=moved, ranked=True)
        if not issubclass(method, (SET, DSR)):
            updates = replace(updates, score_sketches=argument("score_sketches") or 0)
        if issubclass(method, GSE):
            return replace(updates, candidates=float(argument("subset_factor")))
        if issubclass(method, RigL):
            several = self.devices > 1 or argument("scoring") == "screen"
            if not several:
                return replace(updates, scores_all=True)
            shortlist = 0.0 if issubclass(method, SRigL) else float(argument("shortlist"))
            return replace(updates, sketches=argument("sketches"), candidates=shortlist * moved)
        return updates

    def scaled(self, size: int) -> Planned:
        """Return the run with another width: so many steps of the recipe's width, or eighths of its channels."""
        recipe = find(self.config.recipe)
        if recipe.width is None:
            return replace(self, config=replace(self.config, width_multiplier=size / WIDTHS))
        return replace(self, config=replace(self.config, width=size * self.width_step))

    @property
    def width_step(self) -> int:
        """Features between one width and the next larger one that the recipe's network may have."""
        return max(find(self.config.recipe).width_step, self.config.block_size)


def _of_size(part: torch.Tensor, size: int, channels_last: bool) -> torch.Tensor:
    """Return a tensor without data like a batch of one example, of that many."""
    order = torch.channels_last if channels_last and part.dim() == 4 else torch.contiguous_format
    return torch.empty(size, *part.shape[1:], dtype=part.dtype, device="meta", memory_format=order)


def _default(method: type[Method], name: str) -> Any:
    for kind in method.__mro__:
        parameter = inspect.signature(kind).parameters.get(name)
        if parameter is not None and parameter.default is not parameter.empty:
            return parameter.default
    raise KeyError(name)
