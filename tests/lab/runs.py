"""Runs, resolved, for the tests of the lab."""

from __future__ import annotations

import json
from typing import Any

from sparsekern.lab.config import Config
from sparsekern.lab.data import Dataset
from sparsekern.lab.recipes import RECIPES
from sparsekern.lab.resolved import Run, build, resolve
from sparsekern.lab.run import Observer
from sparsekern.lab.tasks import Classification
from sparsekern.lab.train import Learner

IMAGE_RECIPES = [name for name, recipe in RECIPES.items() if recipe.task is Classification]

IMAGE_NETWORKS = list({RECIPES[name].model: name for name in reversed(IMAGE_RECIPES)}.values())
"""A recipe for each network."""

DATA = {
    "name": "digits",
    "train_images": 100,
    "test_images": 10,
    "classes": 10,
    "image_shape": [1, 8, 8],
    "sha256": "",
}
"""What a run says of its data."""


def changed(config: Config, **changes: Any) -> Config:
    """The configuration with other values; those of the recipe are asked anew where the method changes."""
    return Config(**{**config.to_json(), **changes})


def run_of(config: Config, data: Dataset | None = None, shape: tuple[int, ...] = (1, 8, 8), classes: int = 10) -> Run:
    """The run of a configuration on data, or on 1000 images of noise."""
    noise = Classification.noise({"train_images": 1000, "image_shape": shape, "classes": classes}, 1000)
    return resolve(config, noise if data is None else Classification(data))


def learner_of(network: str, config: Config, data: Dataset, seed: int = 0) -> Learner:
    return Learner(run_of(config, data), network, seed)


def network_of(network: str, config: Config, shape: tuple[int, ...], classes: int, seed: int) -> Any:
    return build(run_of(config, None, shape, classes), network, seed)


class StopAt(Observer):
    """Asks to stop before the steps given, counted from 0."""

    def __init__(self, *steps: int) -> None:
        self.stops, self.asked, self.seen = steps, 0, []  # type: ignore[var-annotated]

    def should_stop(self) -> bool:
        self.asked += 1
        return self.asked - 1 in self.stops

    def row(self, row: dict[str, Any]) -> None:
        self.seen.append(row)


def rows_of(folder: Any, *, timed: bool = False) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, without times unless asked."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    drop = () if timed else ("ms_per_step", "seconds", "update_seconds")
    return [{key: value for key, value in row.items() if key not in drop} for row in rows]
