"""Progress of a run: a bar on a terminal, a line per epoch elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sparsekern.lab import Config
from sparsekern.lab.compare import CompareObserver
from sparsekern.lab.metric import metric_of
from sparsekern.lab.recipes import find
from sparsekern.lab.train import Learner


class Live(CompareObserver):
    """Shows seed, epoch, and the loss and metric of both networks. Use it in a ``with`` block.

    A comparison has a bar of its own above that of its run.

    Args:
        console: on stderr, so that stdout holds the results alone.
        should_stop: whether the user asked to stop.
        quiet: show nothing.
    """

    def __init__(self, console: Console, should_stop: Callable[[], bool], *, quiet: bool) -> None:
        self._console, self._asked, self._quiet = console, should_stop, quiet
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[state]}", markup=False),
            console=console,
            transient=True,
            disable=quiet or not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._all: TaskID | None = None
        self._heading = ""

    def __enter__(self) -> Live:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, config: Config, batches: int, rows: Sequence[dict[str, Any]]) -> None:
        """Start the bar: all steps of all seeds and networks, those of earlier rows done."""
        self._config = config
        self._steps: dict[tuple[int, str], int] = {}
        self._state: dict[str, str] = {}
        self._reached: dict[str, str] = {}
        if self._task is not None:
            self._progress.remove_task(self._task)
        total = config.seeds * len(config.networks) * (config.epochs or 0) * batches
        self._task = self._progress.add_task("starting", total=total, state="")
        for row in rows:
            self._take(row)

    def cell(self, name: str, config: Config, number: int, total: int) -> None:
        """Show which run of a comparison it is."""
        self._heading = f"{name}  "
        if self._all is None:
            self._all = self._progress.add_task("", total=total, state="")
        self._progress.update(self._all, completed=number, description=f"run {number + 1}/{total}", state=name)
        if self._progress.disable and not self._quiet:
            self._console.print(f"run {number + 1}/{total}  {name}")

    def step(self, learner: Learner, loss: float) -> None:
        """Advance the bar."""
        speed = learner.speed()
        self._show(learner.seed, learner.network, learner.epoch + 1, learner.steps, loss, speed and f" {speed}")

    def row(self, row: dict[str, Any]) -> None:
        """Remember the metric; without a bar, print a line."""
        self._take(row)
        if self._progress.disable and not self._quiet and row["network"] == self._config.networks[-1]:
            where = self._where(row["seed"], row["epoch"])
            self._console.print(f"{self._heading}{where}  {'  '.join(self._state.values())}")

    def should_stop(self) -> bool:
        """Return what the user asked for."""
        return self._asked()

    def _take(self, row: dict[str, Any]) -> None:
        metric = metric_of(row)
        self._reached[row["network"]] = f" {metric.text(row[metric.key], metric.digits)}"
        self._show(row["seed"], row["network"], row["epoch"], row["step"], row["loss"])

    def _show(self, seed: int, network: str, epoch: int, steps: int, loss: float, speed: str = "") -> None:
        self._steps[seed, network] = steps
        name, scale = find(self._config.recipe).task.metric.loss
        self._state[network] = f"{network} {name} {scale * loss:.4f}{self._reached.get(network, '')}{speed}"
        assert self._task is not None  # begin() comes first
        self._progress.update(
            self._task,
            completed=sum(self._steps.values()),
            description=self._where(seed, epoch),
            state="  ".join(self._state.values()),
        )

    def _where(self, seed: int, epoch: int) -> str:
        return f"seed {seed + 1}/{self._config.seeds}  epoch {epoch}/{self._config.epochs}"
