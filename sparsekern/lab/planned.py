"""A run as a plan needs it: its step on the meta device, its updates, and how large its network can be made."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from sparsekern.analysis.plan import Step, Updates
from sparsekern.errors import InputError
from sparsekern.lab.config import Config
from sparsekern.lab.language import Language
from sparsekern.lab.networks import build
from sparsekern.lab.recipes import find
from sparsekern.lab.resolved import Run, resolve
from sparsekern.training import GSE, SET, VRPGE, Gradual, Method, RigL

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
        ValueError: AGENT or a transform of the network is on, of which no plan is made.
    """

    config: Config
    devices: int = 1
    image: tuple[int, int] = (3, 32)
    classes: int = 10

    def __post_init__(self) -> None:
        for name in ("agent", "transform"):
            if self.config.options.get(name):
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
        with torch.device("meta"):
            model = build(run, network, seed=0)
        generator = torch.Generator().manual_seed(0)
        one = run.task.batch(run.task.order(generator), 0, 1, generator)
        size = config.batch_size // self.devices // config.accumulate
        return Step(
            model,
            tuple(_of_size(part, size, run.recipe.channels_last) for part in one),
            run.task.loss,
            lambda model: run.recipe.optimizer.build(model, config.rate),
            run.recipe.clip_norm,
            run.dtype,
        )

    def updates(self) -> Updates:
        """Return what the run's method computes and sends."""
        return updates_of(self.run(), self.devices)

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


def updates_of(run: Run, devices: int) -> Updates:
    """Return what an update of a run's method computes and sends.

    Args:
        run: with the method and its arguments.
        devices: RigL scores places in another way on several.
    """
    method, every = run.method, int(run.arguments["update_every"])

    def argument(name: str) -> Any:
        return run.arguments.get(name, _default(method, name))

    if issubclass(method, VRPGE):
        assert run.pool is not None
        forwards = (argument("masks") - 1) / argument("structure_every")
        return Updates(every=every, masked=1 / run.pool, forwards=forwards)
    if issubclass(method, Gradual):
        return Updates(every=every, ranked=True)
    if not issubclass(method, (SET, RigL, GSE)):
        return Updates()
    moved = float(argument("drop_fraction"))
    updates = Updates(every=every, moved=moved, ranked=True)
    if not issubclass(method, SET):
        updates = replace(updates, score_sketches=argument("score_sketches") or 0)
    if issubclass(method, GSE):
        return replace(updates, candidates=float(argument("subset_factor")))
    if issubclass(method, RigL):
        several = devices > 1 or argument("scoring") == "screen"
        more: Mapping[str, Any] = (
            {"sketches": argument("sketches"), "candidates": argument("shortlist") * moved} if several else {}
        )
        return replace(updates, scores_all=not several, **more)
    return updates


def _default(method: type[Method], name: str) -> Any:
    for kind in method.__mro__:
        parameter = inspect.signature(kind).parameters.get(name)
        if parameter is not None and parameter.default is not parameter.empty:
            return parameter.default
    raise KeyError(name)
