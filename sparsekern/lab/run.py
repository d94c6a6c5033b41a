"""The training loop of a run: seed by seed, epoch by epoch, the two networks in turn."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import sparsekern as sk
from sparsekern.errors import InputError
from sparsekern.lab import checkpoint
from sparsekern.lab.config import Config, usable_device
from sparsekern.lab.data import Dataset, load
from sparsekern.lab.history import History
from sparsekern.lab.lock import locked
from sparsekern.lab.recipes import find
from sparsekern.lab.report.pictures import draw_graphs, draw_or_warn, draw_summary
from sparsekern.lab.results import summarise
from sparsekern.lab.store import (
    CONFIG,
    DEFAULT,
    METRICS,
    PICTURE,
    RESULTS,
    SPECTRAL,
    Clock,
    Keeping,
    Metrics,
    best_step,
    create,
    read_config,
    read_json,
    read_keeping,
    read_results,
    write_json,
)
from sparsekern.lab.train import Learner
from sparsekern.nn import sparse_layers
from sparsekern.ops import BACKENDS, supports

RESUMED = 3
"""The oldest format of a run folder whose training goes on bit for bit: before it steps were timed otherwise."""


class Observer:
    """What a run tells while it goes on; the methods do nothing and may be overridden."""

    def begin(self, config: Config, batches: int, rows: Sequence[dict[str, Any]]) -> None:
        """Training begins, or goes on after ``rows``; an epoch of one network has that many batches."""

    def step(self, learner: Learner, loss: float) -> None:
        """A step is done."""

    def row(self, row: dict[str, Any]) -> None:
        """A network has finished an epoch; its row of ``metrics.jsonl``."""

    def should_stop(self) -> bool:
        """Return whether to save and stop; asked before every step."""
        return False


class Interrupted(Exception):
    """The run was stopped on request; everything is saved in ``folder``."""

    def __init__(self, folder: Path) -> None:
        super().__init__(f"stopped; everything is saved in {folder}")
        self.folder = folder


def start(config: Config, folder: Path, observer: Observer, keeping: Keeping = DEFAULT) -> dict[str, Any]:
    """Train in a new run folder; returns what :func:`resume` does.

    Raises:
        ValueError: data, options or the folder are not usable, or another process uses the folder.
        Interrupted: the observer asked to stop.
    """
    data = load(config.data, config.data_max_gib)
    config = config.resolved(*data.train_images.shape[:2])
    check(config, data)
    with locked(folder):
        create(folder, config, data.describe(), environment(config), keeping)
        return _train(config, data, folder, observer, keeping)


def resume(folder: Path, observer: Observer, **keeping: Any) -> dict[str, Any]:
    """Go on with a run, bit for bit as if it had not stopped (on the CPU); of a finished one read the results.

    Args:
        folder: of the run.
        observer: is told what happens.
        keeping: fields of :class:`Keeping` that are to be others than those the run began with.

    Returns:
        The content of ``results.json``.

    Raises:
        ValueError: the folder is not that of a run, the run is unfinished and of an old format, its data have changed,
            or another process trains in it.
        Interrupted: the observer asked to stop.
    """
    config, described = read_config(folder)
    kept = replace(read_keeping(folder), **keeping)
    if (folder / RESULTS).is_file():
        return _finished(config, folder)
    if (version := read_json(folder / CONFIG)["format_version"]) < RESUMED:
        raise InputError(
            f"{folder} has format version {version}, of which this code reads unfinished runs but cannot go on with "
            "them: finish it with the version of sparsekern that began it, or start a new run"
        )
    data = load(config.data, config.data_max_gib)
    if data.describe() != described:
        raise InputError(f"the data of {folder} have changed since it began; restore them, or start a new run")
    check(config, data)
    with locked(folder):
        if (folder / RESULTS).is_file():  # whoever held the lock before has finished
            return _finished(config, folder)
        return _train(config, data, folder, observer, kept)


def check(config: Config, data: Dataset) -> None:
    """Raise every error about the options before the run folder is made: building a network finds the last ones."""
    usable_device(str(config.device))
    Learner(config.networks[0], config, data, seed=0)


def _train(config: Config, data: Dataset, folder: Path, observer: Observer, keeping: Keeping) -> dict[str, Any]:
    saved = [checkpoint.restore(checkpoint.seed_folder(folder, seed)) for seed in range(config.seeds)]
    for seed, found in enumerate(saved):
        if found is not None:
            _check_state(*found, config, seed)
    before = [row for found in saved if found is not None for row in found[1]["rows"]]
    metrics = Metrics(folder / METRICS, before)
    observer.begin(config, math.ceil(data.train_images.shape[0] / config.batch_size), before)
    on_device = data.to(usable_device(str(config.device)))
    finished = []
    for seed, found in enumerate(saved):
        if found is not None and found[1]["finished"]:
            best = best_step(found[1]["rows"], config.networks)
            # it may have been killed before it did
            checkpoint.tidy(checkpoint.seed_folder(folder, seed), keeping.keep, best)
            finished.append(found[1])
        else:
            finished.append(_Seed(config, on_device, seed, found, folder, metrics, observer, keeping).train())
    rows = [row for state in finished for row in state["rows"]]
    Metrics(folder / METRICS, rows)  # in order, even if a seed was trained anew after a later one had begun
    results = {
        "config": config.to_json(),
        "data": data.describe(),
        "environment": environment(config),
        **summarise(rows, finished[0]["sizes"]),
    }
    write_json(folder / RESULTS, results)  # it says that the run is finished
    _draw(config, folder, results, rows, finished[0]["map"])
    return read_results(folder)


def _draw(
    config: Config, folder: Path, results: dict[str, Any], rows: list[dict[str, Any]], block_map: dict[str, Any] | None
) -> None:
    """Draw the pictures of a finished run that are not there."""
    if not config.sparse or block_map is None:
        return
    if not (folder / PICTURE).exists():
        draw_or_warn(folder / PICTURE, lambda path: draw_summary(path, results, rows, block_map))
    if not (folder / SPECTRAL).exists():
        draw_or_warn(folder / SPECTRAL, lambda path: draw_graphs(path, results, rows))


def _finished(config: Config, folder: Path) -> dict[str, Any]:
    """Return the results of a finished run, and draw its pictures if it was killed before they were."""
    results = read_results(folder)
    if config.sparse and not (folder / PICTURE).exists():
        saved = [checkpoint.restore(checkpoint.seed_folder(folder, seed)) for seed in range(config.seeds)]
        states = [found[1] for found in saved if found is not None and found[1]["finished"]]
        if len(states) == config.seeds:
            _draw(config, folder, results, [row for state in states for row in state["rows"]], states[0]["map"])
    return results


def _check_state(path: Path, state: dict[str, Any], config: Config, seed: int) -> None:
    """Check that the state of a checkpoint is one of this run.

    Raises:
        ValueError: rows or networks are not those of the run at this place.
    """
    finished, networks = state["finished"], set(config.networks)
    parts: dict[str, Any] = state.get("sizes" if finished else "learners", {})
    done = {name: (config.epochs or 0) if finished else part["epoch"] for name, part in parts.items()}
    rows = sorted((row["network"], row["epoch"]) for row in state["rows"])
    wrong = None
    if parts.keys() != networks:
        wrong = f"it is of other networks than {', '.join(config.networks)}"
    elif {row["seed"] for row in state["rows"]} - {seed}:
        wrong = f"it has rows of another seed than {seed}"
    elif rows != sorted((name, epoch) for name, epochs in done.items() for epoch in range(1, epochs + 1)):
        wrong = "its rows are not those of the epochs done"
    elif finished and config.sparse and state.get("map") is None:
        wrong = "it has no block map"
    if wrong is not None:
        raise InputError(f"{path / checkpoint.STATE} is damaged: {wrong}; delete {path} to go on from an older one")


class _Seed:
    """The training of one seed, from the checkpoint and its state that were ``found`` if there are any."""

    def __init__(
        self,
        config: Config,
        data: Dataset,
        seed: int,
        found: tuple[Path, dict[str, Any]] | None,
        folder: Path,
        metrics: Metrics,
        observer: Observer,
        keeping: Keeping,
    ) -> None:
        self.config, self.folder, self.metrics, self.observer = config, folder, metrics, observer
        self.checkpoints = checkpoint.seed_folder(folder, seed)
        self.learners = {name: Learner(name, config, data, seed) for name in config.networks}
        self.rows: list[dict[str, Any]] = []
        if found is not None:
            path, state = found
            self.rows = list(state["rows"])
            try:
                for name, learner in self.learners.items():
                    checkpoint.load_model(path, name, learner.model)
                    learner.load_state_dict(state["learners"][name])
            except ValueError as error:
                raise InputError(f"{path} is damaged: {error}; delete it to go on from an older one") from None
        method = self.learners["sparse"].method if config.sparse else None
        film = None if found is None else found[1].get("history")
        self.history = None if method is None else History(method, film)
        self.keep, self.clock = keeping.keep, Clock(keeping, self.steps)

    @property
    def steps(self) -> int:
        """Steps of all networks together."""
        return sum(learner.steps for learner in self.learners.values())

    def train(self) -> dict[str, Any]:
        """Train to the end; returns the state of the last checkpoint, which keeps no optimizer."""
        learners = self.learners.values()
        for epoch in range(min(learner.epoch for learner in learners), self.config.epochs or 0):
            for learner in learners:
                if learner.epoch == epoch:  # else it was done with it before the interruption
                    self._finish_epoch(learner)
            if epoch + 1 != self.config.epochs:
                self._save()
        sizes = {name: learner.sizes() for name, learner in self.learners.items()}
        block_map = _block_map(self.learners["sparse"]) if self.config.sparse else None
        return self._write({"rows": self.rows, "finished": True, "sizes": sizes, "map": block_map})

    def _finish_epoch(self, learner: Learner) -> None:
        while learner.batch < learner.batches:
            if self.observer.should_stop():
                self._save()
                raise Interrupted(self.folder)
            loss = learner.step()
            if self.history is not None:
                self.history.step()
            self.observer.step(learner, loss)
            # not after the last batch: the checkpoint at the end of the epoch has the same number
            if learner.batch < learner.batches and self.clock.due(self.steps):
                self._save()
        row = learner.finish_epoch()
        self.rows.append(row)
        self.metrics.append(row)
        self.observer.row(row)

    def _save(self) -> None:
        states = {name: learner.state_dict() for name, learner in self.learners.items()}
        self._write({"rows": self.rows, "finished": False, "learners": states})

    def _write(self, state: dict[str, Any]) -> dict[str, Any]:
        models = {name: learner.model for name, learner in self.learners.items()}
        state["history"] = None if self.history is None else self.history.state_dict()
        best = best_step(self.rows, list(self.learners))
        checkpoint.save(self.checkpoints, self.steps, models, state, keep=self.keep, best=best)
        self.clock.set(self.steps)
        return state


def _block_map(sparse: Learner) -> dict[str, Any]:
    """Return where the blocks of the layer with most places are, now and at the start.

    They are sorted keys ``row * C + col``. Of several such layers it is the first. The first layers of a convolutional
    network have too few places to show. ``kernel`` is None for a linear layer.
    """
    assert sparse.method is not None
    name, layer = max(sparse_layers(sparse.model).items(), key=lambda item: item[1].grid.cells)
    return {
        "layer": name,
        "rows": layer.grid.rows,
        "cols": layer.grid.cols,
        "kernel": layer.grid.kernel,
        "start": sparse.method.books.start[name],
        "end": layer.topology.sorted_keys().cpu(),
    }


def environment(config: Config) -> dict[str, Any]:
    """Return what times, and the last bits of results, depend on."""
    device = usable_device(str(config.device))
    block = (config.block_size, config.block_size)
    op = "conv2d" if find(config.recipe).channels_last else "linear"
    return {
        "sparsekern": sk.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "kernels": next(name for name in BACKENDS if supports(name, op, device, torch.float32, block)),
    }
