"""What a training costs, whatever the machine: operations in all, and memory at its highest."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

from sparsekern.analysis import training_bytes
from sparsekern.analysis.allocations import peak_above
from sparsekern.recipes.config import Config
from sparsekern.recipes.data import Dataset
from sparsekern.recipes.learner import Learner
from sparsekern.recipes.options import OPTIONS

PERIOD = 4
"""Steps between updates while counting: room for two steps of probes and one without."""

LONG = 10**6
"""Epochs of a training that is not near its end, and steps to an update that does not come."""


def training_cost(network: str, config: Config, data: Dataset) -> dict[str, int]:
    """Return ``training_flops`` and ``peak_bytes`` of a network of seed 0, from a few steps of copies made for it.

    FLOPs are those of all matrix products of the whole training, at stored elements: forward, backward, the scores of
    updates, and what changes when no block moves any more. Memory is that of an update's period: what is held between
    steps and what a step holds above that; native kernels take their scratch beside it.

    Args:
        network: ``"sparse"`` or ``"dense"``.
        config: resolved.
        data: on the device of the training.
    """
    real = Learner(network, config, data, seed=0)
    steps, period = real.total_steps, max(PERIOD, int(config.options.get("structure_every", 1)))
    usual = _flops(_learner(network, config, data, update_every=LONG), period) / period
    moving = _learner(network, config, data, update_every=period)
    if real.method is None:
        flops = usual * steps
    else:
        schedule = real.method.schedule
        stop = min(steps, steps if schedule.stop is None else schedule.stop)
        updates = sum(schedule.due(step) for step in range(1, steps + 1))
        after = usual
        if "stop" in OPTIONS and config.method in OPTIONS["stop"].methods:
            ended = _learner(
                network, config, data, update_every=LONG, options={**config.options, "start": 0, "stop": 0}
            )
            _step(ended)
            after = _flops(ended, 1)
        extra = max(0.0, _flops(moving, period) - usual * period)
        flops = usual * stop + after * (steps - stop) + extra * updates
    _step(moving)  # the optimizer has its state after the first step
    gradients = sum(p.numel() * p.element_size() for p in moving.model.parameters() if p.requires_grad)
    between = training_bytes(moving.model, moving.optimizer) - gradients
    peak = between + peak_above(lambda: _run(moving, period), moving.device)
    images = data.train_images.shape[0]
    flops *= images / (real.batches * min(images, real.batch_size))  # the last batch of an epoch may be smaller
    return {"training_flops": round(flops), "peak_bytes": peak}


def _learner(network: str, config: Config, data: Dataset, **changes: Any) -> Learner:
    return Learner(network, replace(config, epochs=LONG, **changes), data, seed=0)


def _flops(learner: Learner, steps: int) -> int:
    with FlopCounterMode(display=False) as counter:
        _run(learner, steps)
    return int(counter.get_total_flops())


def _run(learner: Learner, steps: int) -> None:
    for _ in range(steps):
        _step(learner)


def _step(learner: Learner) -> None:
    """Take a step on a whole batch, and never look at the test images."""
    if (learner.batch + 1) * learner.batch_size > learner.data.train_images.shape[0]:
        learner.epoch, learner.batch = learner.epoch + 1, 0
    learner.step()
