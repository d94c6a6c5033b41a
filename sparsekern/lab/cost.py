"""Cost of a training on any machine, in FLOPs and bytes, and the account of a trained network's layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from sparsekern.analysis import Summary, summary
from sparsekern.analysis.measure import peak_above
from sparsekern.lab import checkpoint
from sparsekern.lab.config import Config
from sparsekern.lab.options import OPTIONS
from sparsekern.lab.recipes import find
from sparsekern.lab.resolved import Run, resolve
from sparsekern.lab.train import Learner
from sparsekern.training import AGENT, Gradual, NetworkSampler, compact_

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
    options = run.config.options
    without_agent = {name: value for name, value in options.items() if OPTIONS[name].part != "agent"}
    real = Learner(_changed(run, options=without_agent), network, seed=0)
    steps, period = real.total_steps, max(PERIOD, int(options.get("structure_every", 1)))
    usual = _flops(_long(run, network, options=without_agent, update_every=LONG // 2), period) / period
    moving = _long(run, network, options=without_agent, update_every=period)
    agent = None if run.agent is None else Learner(run, network, seed=0).agent
    if real.method is None:
        flops = usual * steps
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


def _changed(run: Run, **changes: Any) -> Run:
    """Return another run on the same data."""
    return resolve(replace(run.config, **changes), run.task)


def _long(run: Run, network: str, **changes: Any) -> Learner:
    return Learner(_changed(run, epochs=LONG, **changes), network, seed=0)


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
    sizes = {}
    for network in reversed(config.networks):  # the sparse one last
        learner = Learner(run, network, seed=0)
        inputs, _ = learner.next_batch().batch
        learner.step()
        sizes[network] = learner.sizes()
    checkpoint.load_model(newest, learner.network, learner.model)
    if isinstance(learner.method, Gradual):  # what went since
        compact_(learner.model, learner.optimizer)
        sizes[learner.network] = learner.sizes()
    account = summary(learner.model, inputs, optimizer=learner.optimizer, measure=timed)
    return account, {name: sizes[name] for name in config.networks}
