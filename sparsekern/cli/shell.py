"""The frame of every command: what it prints and where, progress, Ctrl-C, exit codes, errors of one line."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from enum import EnumMeta
from inspect import signature
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, cast, get_args

import torch.distributed as dist
import typer
from rich.box import HEAVY_HEAD, Box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from sparsekern.errors import InputError
from sparsekern.lab import Config, Interrupted, Observer
from sparsekern.lab.distributed import LostRank, ToldByFirst, launched
from sparsekern.lab.recipes import find
from sparsekern.lab.report.tables import Cells, printable
from sparsekern.lab.tasks import metric_of
from sparsekern.lab.train import Learner

USAGE_ERROR, INTERRUPTED, LOST_RANK = 2, 130, 3

NO_ROOM = ("No space left on device", "PytorchStreamWriter failed", "inline_container", "Disk quota exceeded")
"""What the system, safetensors and PyTorch say when a disk is full."""

NO_MEMORY = ("can't allocate memory", "bad_alloc", "out of memory", "ALLOC_FAILED")
"""What PyTorch says when there is not enough memory, on a CPU and on CUDA."""


class PlainConsole(Console):
    """Prints text as it is, tables too: no markup, no names of emoji, and nothing that a terminal would obey."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return the text, printable; rich calls this for every string that it prints."""
        return super().render_str(printable(text), **options)


def table(title: str, cells: Cells, numbers: int, box: Box = HEAVY_HEAD) -> Table:
    """Return a table for the terminal, of which ``numbers`` columns after the first are aligned right."""
    made = Table(title=title, title_justify="left", box=box)
    heading, rows = cells
    for column, name in enumerate(heading):
        made.add_column(name, justify="right" if 0 < column <= numbers else "left")
    for row in rows:
        made.add_row(*row)
    return made


def error_console() -> Console:
    """Return the console for progress and errors: stdout holds the results alone."""
    return PlainConsole(stderr=True, soft_wrap=True)


def say(text: str) -> None:
    """Print lines of results on stdout, whatever is in them."""
    typer.echo(printable(text))


def progress(errors: Console, done: str, *behind: TextColumn, quiet: bool = False) -> Progress:
    """Return a bar on a terminal with description, what is done in the form given, and times.

    Args:
        errors: the console.
        done: form of the number behind the bar, such as ``"{task.percentage:3.0f} %"``.
        behind: columns at the end.
        quiet: show nothing.
    """
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TextColumn(done),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        *behind,
        console=errors,
        transient=True,
        disable=quiet or not errors.is_terminal,
    )


@contextmanager
def explained(errors: Console, how_to_go_on: Callable[[bool], str], command: Callable[..., None]) -> Iterator[None]:
    """Turn what the user can mend into one line and an exit code.

    That is an InputError, an error of the system with a file, and a lack of memory or of room on a disk. Any other
    error, a plain ValueError among them, is a defect of sparsekern and keeps its traceback.

    Of several processes the first one tells what they have agreed on. The others then end with code 0: a launcher ends
    all when one of them fails, and the first might not have spoken yet.

    Args:
        errors: where the line goes.
        how_to_go_on: what to say after Ctrl-C; takes whether everything was saved.
        command: whose parameters are options; an error about one names the option.
    """
    world = launched()
    try:
        yield
    except (Interrupted, KeyboardInterrupt) as stop:
        if world.first:
            errors.print(how_to_go_on(isinstance(stop, Interrupted)))
        _end(INTERRUPTED if world.first else 0)
    except ToldByFirst:
        _end(0)
    except LostRank as lost:
        errors.print(f"error: rank {world.rank}: {lost}. {how_to_go_on(False)}")
        _end(LOST_RANK)
    except Exception as error:
        message = _way_out(error, how_to_go_on, signature(command).parameters)
        if message is not None:
            errors.print(f"error: {'' if world.first else f'rank {world.rank}: '}{message}")
            _end(USAGE_ERROR)
        if not dist.is_initialized():
            raise
        traceback.print_exc()
        _end(1)


def _end(code: int) -> NoReturn:
    """End the command. One of several processes ends at once: what waits for the others would hold it up."""
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise typer.Exit(code) from None


def _way_out(error: Exception, how_to_go_on: Callable[[bool], str], options: Collection[str]) -> str | None:
    """Return what the user is told of an error, or None for a defect of sparsekern, which keeps its traceback."""
    if any(words in str(error) for words in NO_ROOM):
        return f"there is no room left on the disk; free some. {how_to_go_on(False)}"
    if isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY):
        return "the memory does not suffice; choose a smaller width, batch size or data set"
    if isinstance(error, OSError):
        where = "a file" if error.filename is None else error.filename
        return f"{where} cannot be used ({error.strerror or error}); check the path, the permissions and the disk"
    if not isinstance(error, InputError):
        return None
    option = (error.parameter or "").replace("_", "-")  # as the command spells it
    return f"{error} (option --{option})" if error.parameter in options and option not in str(error) else str(error)


def check_file(file: Path, parameter: str, other: str = "another name") -> None:
    """Check before any work that a file may be written: its folder is there, and it is no folder itself.

    Args:
        file: where to write.
        parameter: the option that gives it.
        other: what to choose instead.

    Raises:
        ValueError: it is not.
    """
    if not file.parent.is_dir():
        raise InputError(
            f"{parameter} is {file}, whose folder does not exist; make the folder, or choose {other}",
            parameter=parameter,
        )
    if file.is_dir():
        raise InputError(f"{parameter} is {file}, which is a folder; give the name of a file", parameter=parameter)


def check_one_process(command: str) -> None:
    """Stop on every rank if a launcher such as torchrun started several processes; the first rank says why.

    Raises:
        ValueError: on all ranks.
    """
    world = launched()
    if world.count > 1:
        text = f"WORLD_SIZE is {world.count}, but {command} runs in one process; start it without torchrun"
        raise InputError(text) if world.first else ToldByFirst(text)


def stopped(saved: bool) -> str:
    """Return what a command says after Ctrl-C that has nothing to go on with."""
    return "stopped; nothing was written"


class CtrlC:
    """Turns the first Ctrl-C into a request, which the loop reads between two steps; a second one ends at once.

    A KeyboardInterrupt in the middle of a step would leave weights and optimizer state of different steps. SIGTERM,
    which batch systems send some time before they kill, is such a request too. Under a launcher, which passes on what
    the terminal sends to each process as well, all of them are requests.
    """

    def __init__(self) -> None:
        self._asked = False
        self._previous: dict[int, Any] = {}

    def asked(self) -> bool:
        """Return whether Ctrl-C was pressed."""
        return self._asked

    def __enter__(self) -> CtrlC:
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        if launched().count == 1:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


USAGE = cast(type[Exception], typer.BadParameter.__mro__[1])
"""The parent of all errors of usage, which typer does not export."""


class PlainErrors(TyperGroup):
    """A group of commands that says in one line what is wrong with an option, and where the help is."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command; without a command show the help."""
        arguments = list(sys.argv[1:] if args is None else args) or ["--help"]
        try:
            code = super().main(arguments, prog_name, complete_var, False, windows_expand_args, **extra)
        except USAGE as error:
            if not standalone_mode:
                raise
            print(printable(f"error: {sentence(error, arguments)}"), file=sys.stderr)
            sys.exit(2)
        if standalone_mode:
            sys.exit(code if isinstance(code, int) else 0)
        return code


KINDS = {int: "a whole number", float: "a number"}
"""The kinds of values, in words."""


def sentence(error: Any, arguments: Sequence[str] = ()) -> str:
    """Return what an error of usage says, in one line, and the command that shows the help.

    Args:
        error: typer's.
        arguments: of the command line: typer does not say what a value of the wrong kind was.
    """
    text = _about_value(error, arguments) or " ".join(error.format_message().split()).rstrip(".")
    command = "sparsekern" if error.ctx is None else error.ctx.command_path
    text += "" if text.endswith("?") else ";"
    return f"{text[:1].lower()}{text[1:]} {command} --help shows what there is"


def _about_value(error: Any, arguments: Sequence[str]) -> str | None:
    """Return what is wrong with the value of an option that must be a number or a choice; None for any other error."""
    option = getattr(error, "param", None)
    if option is None or error.ctx is None:
        return None
    declared = signature(error.ctx.command.callback, eval_str=True).parameters[option.name]
    kind = _kind(declared.annotation)
    if kind is None:
        return None
    rule = KINDS.get(kind) or f"one of {', '.join(str(choice.value) for choice in kind)}"
    name = option.opts[0]
    given = _values(name, arguments)
    if not given:
        return f"missing option {name!r}, which is {rule}"
    wrong = next((value for value in given if not _fits(kind, value)), None)
    return None if wrong is None else f"{name} is {wrong!r}; it must be {rule}"


def _kind(annotation: Any) -> Any:
    """Return int, float or the enumeration in an annotation such as ``list[int] | None``; None without one."""
    if isinstance(annotation, EnumMeta) or any(annotation is kind for kind in KINDS):
        return annotation
    return next((kind for part in get_args(annotation) if (kind := _kind(part)) is not None), None)


def _fits(kind: Callable[[str], object], value: str) -> bool:
    try:
        kind(value)
    except ValueError:
        return False
    return True


def _values(option: str, arguments: Sequence[str]) -> list[str]:
    """Return what was given for an option, the last first: that is the one that counts."""
    after = [arguments[i + 1] for i, text in enumerate(arguments[:-1]) if text == option]
    joined = [text.partition("=")[2] for text in arguments if text.startswith(f"{option}=")]
    return [*reversed(joined), *reversed(after)]


class Live(Observer):
    """Shows seed, epoch, and the loss and metric of both networks. Use it in a ``with`` block.

    A comparison has a bar of its own above that of its run.

    Args:
        console: on stderr, so that stdout holds the results alone.
        should_stop: whether the user asked to stop.
        quiet: show nothing.
    """

    def __init__(self, console: Console, should_stop: Callable[[], bool], *, quiet: bool) -> None:
        self._console, self._asked, self._quiet = console, should_stop, quiet
        state = TextColumn("{task.fields[state]}", markup=False)
        self._progress = progress(console, "{task.percentage:3.0f} %", state, quiet=quiet)
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
        total = config.seeds * sum(map(config.epochs_of, config.networks)) * batches
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
        self._show(
            learner.seed, learner.network, learner.all_epochs + 1, learner.all_steps, loss, speed and f" {speed}"
        )

    def row(self, row: dict[str, Any]) -> None:
        """Remember the metric; without a bar, print a line."""
        self._take(row)
        last = self._config.networks[-1]  # but for rounds that it has not
        done = row["network"] == last or row["epoch"] > self._config.epochs_of(last)
        if self._progress.disable and not self._quiet and done:
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
        return f"seed {seed + 1}/{self._config.seeds}  epoch {epoch}/{self._config.epochs_of(self._config.networks[0])}"
