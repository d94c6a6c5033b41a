"""The loop of a run: seed by seed, epoch by epoch, the two networks in turn, with what is saved on the way."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sparsekern as sk
from sparsekern.errors import InputError
from sparsekern.files import load_
from sparsekern.integrations.methods import LogTo, log, open_log
from sparsekern.lab import checkpoint
from sparsekern.lab.checkpoint import DEFAULT, Clock, Keeping
from sparsekern.lab.config import Config
from sparsekern.lab.distributed import ALONE, World, gathered
from sparsekern.lab.history import History
from sparsekern.lab.report.pictures import draw_graphs, draw_or_warn, draw_summary
from sparsekern.lab.resolved import Run, build, resolve
from sparsekern.lab.results import best_step, summarise
from sparsekern.lab.store import (
    METRICS,
    PICTURE,
    RESULTS,
    SPECTRAL,
    append_row,
    create,
    locked,
    read_config,
    read_results,
    write_json,
    write_rows,
)
from sparsekern.lab.train import Learner
from sparsekern.ops import backends


class Observer:
    """Callbacks of a run and of a comparison; the methods do nothing and may be overridden."""

    def cell(self, name: str, config: Config, number: int, total: int) -> None:
        """Report that the run of a cell of a comparison begins or goes on, as ``number`` of ``total``."""

    def begin(self, config: Config, batches: int, rows: Sequence[dict[str, Any]]) -> None:
        """Report that training begins, or goes on after ``rows``; ``batches`` are those of one network in an epoch."""

    def step(self, learner: Learner, loss: float) -> None:
        """Report a step."""

    def row(self, row: dict[str, Any]) -> None:
        """Report that a network has finished an epoch, by its row of ``metrics.jsonl``."""

    def should_stop(self) -> bool:
        """Return whether to save and stop; asked before every step."""
        return False


class Logged(Observer):
    """Tells another observer, and logs the numbers of every epoch as ``<network>/seed<n>/<name>``.

    Args:
        observer: is told everything.
        log_to: a folder for TensorBoard, a ``SummaryWriter``, or an object with ``log(dict)``.
    """

    def __init__(self, observer: Observer, log_to: LogTo) -> None:
        self.observer, self.log_to = observer, open_log(log_to)
        self.begin, self.step, self.should_stop = observer.begin, observer.step, observer.should_stop  # type: ignore[method-assign]

    def row(self, row: dict[str, Any]) -> None:
        """Log the numbers of an epoch, at the step that it ended with."""
        prefix = f"{row['network']}/seed{row['seed']}"
        numbers = {f"{prefix}/{key}": n for key, n in row.items() if isinstance(n, (int, float)) and key != "seed"}
        log(self.log_to, numbers, row["step"])
        self.observer.row(row)


class Interrupted(Exception):
    """The run was stopped on request; everything is saved in ``folder``."""

    def __init__(self, folder: Path) -> None:
        super().__init__(f"stopped; everything is saved in {folder}")
        self.folder = folder


@dataclass(frozen=True)
class Finished:
    """A finished run.

    Attributes:
        config: its options.
        results: the content of ``results.json``.
    """

    config: Config
    results: dict[str, Any]


def start(
    config: Config, folder: Path, observer: Observer, keeping: Keeping = DEFAULT, world: World = ALONE
) -> Finished:
    """Train in a new run folder.

    Args:
        config: options of the run.
        folder: is made.
        observer: is told what happens.
        keeping: when to save, and how many checkpoints stay.
        world: the processes that train it together. The first one writes; all of them are told the results.

    Raises:
        ValueError: data, options or the folder are not usable, or another process uses the folder.
        Interrupted: the observer asked to stop.
    """
    return start_resolved(world.together(lambda: resolve(config, config.load(), world)), folder, observer, keeping)


def start_resolved(run: Run, folder: Path, observer: Observer, keeping: Keeping = DEFAULT) -> Finished:
    """Train a run that is resolved already in a new folder; see :func:`start`."""
    # what raises comes before the folder is made
    described, made = run.task.describe(), environment(run)
    run.world.check_same(described, "data")  # by which a score may choose blocks
    first = run.world.together(lambda: {name: Learner(run, name, seed=0) for name in run.config.networks})
    with ExitStack() as held:
        run.world.on_first(lambda: held.enter_context(locked(folder)))
        run.world.on_first(lambda: create(folder, run.config, described, made, keeping))
        return _train(run, folder, observer, keeping, first)


def resume(folder: Path, observer: Observer, world: World = ALONE, **keeping: Any) -> Finished:
    """Go on with a run, on the CPU bit for bit as if it had not stopped; of a finished one read the results.

    Args:
        folder: of the run.
        observer: is told what happens.
        world: the processes that train it together; their number may be another one than before.
        keeping: fields of :class:`~sparsekern.lab.checkpoint.Keeping` that differ from those the run began with.

    Raises:
        ValueError: the folder is not that of a run, its data have changed, or another process trains in it.
        Interrupted: the observer asked to stop.
    """
    file = world.on_first(lambda: read_config(folder))
    kept = world.together(lambda: replace(file.keeping, **keeping))

    def finished() -> Finished | None:
        """Return the results if there are any, else None."""
        return world.on_first(lambda: _finished(file.config, folder) if (folder / RESULTS).is_file() else None)

    if (done := finished()) is not None:
        return done

    def resolved() -> Run:
        task = file.config.load()
        if task.describe() != file.data.model_dump():
            raise InputError(f"the data of {folder} have changed since it began; restore them, or start a new run")
        return resolve(file.config, task, world)

    run = world.together(resolved)
    with ExitStack() as held:
        world.on_first(lambda: held.enter_context(locked(folder)))
        if (done := finished()) is not None:  # whoever held the lock before has finished
            return done
        return _train(run, folder, observer, kept, {})


def _train(run: Run, folder: Path, observer: Observer, keeping: Keeping, first: dict[str, Learner]) -> Finished:
    """Train all seeds that are not finished; ``first`` holds the learners of seed 0 that are built already, if any."""
    config, world = run.config, run.world
    saved = world.on_first(lambda: _restored(config, folder))
    before = [row for found in saved if found is not None for row in found[1]["rows"]]
    world.on_first(lambda: write_rows(folder / METRICS, before))
    observer.begin(config, run.batches, before)
    finished = []
    for seed, found in enumerate(saved):
        if found is not None and found[1]["finished"]:
            finished.append(found[1])
        else:
            learners = {name: first.pop(name) if first else Learner(run, name, seed) for name in config.networks}
            finished.append(_Seed(run, learners, seed, found, folder, observer, keeping).train())
    rows = [row for state in finished for row in state["rows"]]
    content = {
        "config": config.to_json(),
        "data": run.task.describe(),
        "environment": environment(run),
        **summarise(rows, finished[0]["sizes"], run.task.metric, run.task.tokens(config.batch_size)),
    }
    for name, text in finished[0]["written"].items():
        content["networks"][name]["written"] = text

    def write() -> Finished:
        for seed, found in enumerate(saved):
            if found is not None and found[1]["finished"]:  # it may have been killed before it tidied up
                best = best_step(found[1]["rows"], config.networks, run.task.metric)
                checkpoint.tidy(checkpoint.seed_folder(folder, seed), keeping.keep, best)
        write_rows(folder / METRICS, rows)  # in order, even if a seed was trained anew after a later one had begun
        results = write_json(folder / RESULTS, content)  # it says that the run is finished
        _draw(config, folder, results, rows, finished[0]["history"])
        return Finished(config, results)

    return world.on_first(write)


def _restored(config: Config, folder: Path) -> list[tuple[Path, dict[str, Any]] | None]:
    """Return the newest checkpoint of each seed, if there is one, and its state."""
    saved = [checkpoint.restore(checkpoint.seed_folder(folder, seed)) for seed in range(config.seeds)]
    for seed, found in enumerate(saved):
        if found is not None:
            _check_state(*found, config, seed)
    return saved


def _draw(
    config: Config, folder: Path, results: dict[str, Any], rows: list[dict[str, Any]], history: dict[str, Any] | None
) -> None:
    """Draw the pictures of a finished run that are not there."""
    if history is None:
        return
    if not (folder / PICTURE).exists():
        draw_or_warn(folder / PICTURE, lambda path: draw_summary(path, config, results, rows, history))
    if not (folder / SPECTRAL).exists():
        draw_or_warn(folder / SPECTRAL, lambda path: draw_graphs(path, config, results, rows))


def _finished(config: Config, folder: Path) -> Finished:
    """Return the results of a finished run, and draw its pictures if it was killed before they were."""
    results = read_results(folder)
    if config.sparse and not (folder / PICTURE).exists():
        saved = [checkpoint.restore(checkpoint.seed_folder(folder, seed)) for seed in range(config.seeds)]
        states = [found[1] for found in saved if found is not None and found[1]["finished"]]
        if len(states) == config.seeds:
            rows = [row for state in states for row in state["rows"]]
            _draw(config, folder, results, rows, states[0]["history"])
    return Finished(config, results)


def _check_state(path: Path, state: dict[str, Any], config: Config, seed: int) -> None:
    """Check that the state of a checkpoint is one of this run.

    Raises:
        ValueError: rows or networks are not those of the run at this place.
    """
    finished, networks = state["finished"], set(config.networks)
    parts: dict[str, Any] = state.get("sizes" if finished else "learners", {})
    of_round = (config.epochs or 0) - config.rewound()
    done = {
        name: config.epochs_of(name) if finished else part["epoch"] + part["round"] * of_round
        for name, part in parts.items()
    }
    rows = sorted((row["network"], row["epoch"]) for row in state["rows"])
    wrong = None
    if parts.keys() != networks:
        wrong = f"it is of other networks than {', '.join(config.networks)}"
    elif {row["seed"] for row in state["rows"]} - {seed}:
        wrong = f"it has rows of another seed than {seed}"
    elif rows != sorted((name, epoch) for name, epochs in done.items() for epoch in range(1, epochs + 1)):
        wrong = "its rows are not those of the epochs done"
    elif config.sparse and state["history"] is None:
        wrong = "it has no block maps"
    if wrong is not None:
        raise InputError(f"{path / checkpoint.STATE} is damaged: {wrong}; delete {path} to go on from an older one")


class _Seed:
    """The training of one seed, from the checkpoint and its state that were ``found``, if any."""

    def __init__(
        self,
        run: Run,
        learners: dict[str, Learner],
        seed: int,
        found: tuple[Path, dict[str, Any]] | None,
        folder: Path,
        observer: Observer,
        keeping: Keeping,
    ) -> None:
        self.run, self.learners = run, learners
        self.folder, self.observer = folder, observer
        self.checkpoints = checkpoint.seed_folder(folder, seed)
        self.rows: list[dict[str, Any]] = []
        if found is not None:
            path, state = found
            self.rows = list(state["rows"])
            try:
                for name, learner in learners.items():
                    model = build(run, name, seed) if run.world.sharded else learner.model

                    def read(model: nn.Module = model, name: str = name) -> None:
                        load_(model, path / f"{name}.safetensors")

                    run.world.on_first(read)
                    if run.world.count > 1:
                        run.world.load_(learner.model, model.state_dict())
                    learner.load_state_dict(state["learners"][name])
            except InputError as error:
                raise type(error)(f"{path} is damaged: {error}; delete it to go on from an older one") from None
        method = learners["sparse"].method if run.config.sparse else None
        self.history = None if method is None else History(method, None if found is None else found[1]["history"])
        self.keep, self.clock = keeping.keep, Clock(keeping, self.steps)

    @property
    def steps(self) -> int:
        """Steps of all networks together."""
        return sum(learner.all_steps for learner in self.learners.values())

    def train(self) -> dict[str, Any]:
        """Train to the end; returns the state of the last checkpoint, which keeps no optimizer."""
        learners = self.learners.values()
        epochs_of = self.run.config.epochs_of
        epochs = max(epochs_of(learner.network) for learner in learners)
        for epoch in range(min(learner.all_epochs for learner in learners), epochs):
            for learner in learners:
                # else it was done with it before the interruption, or has no more rounds
                if learner.all_epochs == epoch < epochs_of(learner.network):
                    self._finish_epoch(learner)
            if epoch + 1 != epochs:
                self._save()
        sizes = {name: learner.sizes() for name, learner in self.learners.items()}
        texts = {name: learner.written() for name, learner in self.learners.items()}
        written = {name: text for name, text in texts.items() if text is not None}
        return self._write({"rows": self.rows, "finished": True, "sizes": sizes, "written": written})

    def _finish_epoch(self, learner: Learner) -> None:
        while learner.batch < learner.batches:
            if self.run.world.any(self.observer.should_stop()):
                self._save()
                raise Interrupted(self.folder)
            loss = learner.step()
            if self.history is not None:
                self.history.step()
            self.observer.step(learner, loss)
            # not after the last batch: the checkpoint at the end of the epoch has the same number
            if learner.batch < learner.batches and self.run.world.any(self.clock.due(self.steps)):
                self._save()
        row = learner.finish_epoch()
        if self.history is not None:
            self.history.step()
        self.rows.append(row)
        if self.run.world.first:
            append_row(self.folder / METRICS, row)
        self.observer.row(row)

    def _save(self) -> None:
        states = {name: learner.state_dict() for name, learner in self.learners.items()}
        self._write({"rows": self.rows, "finished": False, "learners": states})

    def _write(self, state: dict[str, Any]) -> dict[str, Any]:
        models = {name: gathered(learner.model.state_dict()) for name, learner in self.learners.items()}
        state["history"] = None if self.history is None else self.history.state_dict()
        best = best_step(self.rows, list(self.learners), self.run.task.metric)
        self.run.world.on_first(
            lambda: checkpoint.save(self.checkpoints, self.steps, models, state, keep=self.keep, best=best)
        )
        self.clock.set(self.steps)
        return state


def environment(run: Run) -> dict[str, Any]:
    """Return what times, and the last bits of results, depend on."""
    device, block = run.device, (run.config.block_size, run.config.block_size)
    op, x = "conv2d" if run.recipe.channels_last else "linear", torch.empty(0, device=device)
    return {
        "sparsekern": sk.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})",
        "threads": torch.get_num_threads(),
        **({"ranks": run.world.count} if run.world.count > 1 else {}),
        "kernels": backends.resolve(backends.requested_backend(), op, x, block),
    }
