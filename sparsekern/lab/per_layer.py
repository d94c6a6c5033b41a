"""What each layer of a run's network stores and how long it takes, found out on this machine, without the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sparsekern.analysis import Summary, summary
from sparsekern.lab import checkpoint
from sparsekern.lab.config import Config, usable_device
from sparsekern.lab.data import Dataset
from sparsekern.lab.learner import Learner


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
    device = usable_device(str(config.device))
    count, classes = min(config.batch_size, described["train_images"]), described["classes"]
    images = torch.randn(count, *described["image_shape"], generator=torch.Generator().manual_seed(0))
    labels = torch.arange(count) % classes
    noise = Dataset("noise", images, labels, images[:1], labels[:1], classes, "").to(device)
    sizes, learner = {}, None
    for network in reversed(config.networks):  # the sparse one last
        learner = Learner(network, config, noise, seed=0)
        learner.step()
        sizes[network] = learner.sizes()
    assert learner is not None
    checkpoint.load_model(newest, learner.network, learner.model)
    account = summary(learner.model, noise.train_images, optimizer=learner.optimizer, measure=timed)
    return account, {name: sizes[name] for name in config.networks}
