"""``sparsekern bench``: whether sparse layers are faster than dense ones, on this machine, for the user's layer."""

from __future__ import annotations

import json
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

import sparsekern
from sparsekern.cli.info import cpu_model
from sparsekern.cli.options import Json, Quiet
from sparsekern.cli.shell import PlainConsole, check_folder_of, error_console, explained, say
from sparsekern.errors import InputError
from sparsekern.lab.bench.picture import MOST, draw_bench
from sparsekern.lab.bench.request import DTYPES, Request, read_request
from sparsekern.lab.bench.results import SLOWER, break_evens, group_title, groups, model_cells, table_cells
from sparsekern.lab.bench.run import Report, run_bench
from sparsekern.lab.report.tables import Cells
from sparsekern.lab.report.text import count

WIDTH = 140
"""Columns of the tables where there is no terminal."""

PICTURES = (".png", ".svg", ".pdf")

OPTIONS = ("linear", "tokens", "conv", "stride", "image", "model", "input", "sparsity", "block", "dtype", "threads",
           "device", "seconds", "picture")  # fmt: skip


def bench(
    linear: Annotated[
        list[str] | None,
        typer.Option(
            help="A linear layer, INxOUT. Repeat it for more.", show_default="1024x4096, if nothing else is named"
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Rows of the input of linear layers.")] = 512,
    conv: Annotated[
        list[str] | None,
        typer.Option(help="A convolution, INxOUTxKERNEL, such as 64x128x3. Repeat it for more."),
    ] = None,
    stride: Annotated[int, typer.Option(help="Stride of the convolutions.")] = 1,
    image: Annotated[
        str | None,
        typer.Option(help="Input of convolutions or of a recipe, BATCHxHEIGHTxWIDTH.", show_default="32x32x32"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Every layer of a model: a recipe of `sparsekern train --list`, or module:function, which is called "
            "without arguments and returns the model, or the model and a sample of its input."
        ),
    ] = None,
    input: Annotated[
        str | None, typer.Option(help="Shape of the model's input, such as 8x3x224x224, if no sample is returned.")
    ] = None,
    sparsity: Annotated[str, typer.Option(help="Fractions absent, with commas between them.")] = "0.5,0.75,0.9,0.95",
    block: Annotated[
        str, typer.Option(help="Sides of the blocks, or OUTxIN such as 32x16, with commas between them.")
    ] = "1,16,32",
    dtype: Annotated[str, typer.Option(help=f"Of {', '.join(DTYPES)}, with commas between them.")] = "float32",
    threads: Annotated[
        str | None, typer.Option(help="Numbers of threads, with commas between them.", show_default="PyTorch's")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:<number>.")] = "cpu",
    seconds: Annotated[float, typer.Option(help="Time of a race after which five rounds are enough.")] = 0.7,
    peers: Annotated[
        bool, typer.Option("--peers", help="Race other libraries, too: SparseLab, where it is installed.")
    ] = False,
    picture: Annotated[
        Path | None, typer.Option(help=f"Draw the speed-up over sparsity: a file, {', '.join(PICTURES)}.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Race sparse layers against the dense layer that they replace, on this machine.

    Dense and sparse layers take turns in one process, forward and forward + backward, through autograd as in a
    training. Answers are checked against dense products in float64 first. The tables show medians and quartiles, how
    many times as fast as dense each block size is, and from which sparsity on.

    Examples:

    sparsekern bench --linear 768x3072 --tokens 4096 --sparsity 0.8,0.9 --threads 1,2

    sparsekern bench --conv 64x128x3 --image 32x56x56 --picture conv.png

    sparsekern bench --model resnet18-cifar --sparsity 0.9

    sparsekern bench --model torchvision.models:resnet18 --input 8x3x224x224
    """
    errors = error_console()
    with explained(errors, lambda saved: "stopped; nothing is printed before the last race", OPTIONS):
        request = read_request(
            linear=linear or [],
            tokens=tokens,
            conv=conv or [],
            stride=stride,
            image=image,
            model=model,
            input=input,
            sparsity=sparsity,
            block=block,
            dtype=dtype,
            threads=threads,
            device=device,
            peers=peers,
            seconds=seconds,
        )
        check_picture(picture)
        report = _raced(request, errors, quiet)
        place = _place(request)
        drawn = place if report.busy is None else f"{place}; the machine was too busy to believe it"
        if picture is not None and (left := draw_bench(picture, report.rows, drawn)):
            report.note(f"the picture shows the first {MOST} layers; {count(left, 'layer')} more are in the tables")
    if as_json:
        say(json.dumps(_contents(report, place)))
    else:
        _print(request, report, place, picture)


def check_picture(picture: Path | None) -> None:
    """Check before any race that a picture may be written there.

    Raises:
        ValueError: the name ends in no known suffix, the folder is not there, or there is a folder.
    """
    if picture is None:
        return
    if picture.suffix not in PICTURES:
        raise InputError(f"picture is {picture}; the name must end in {', '.join(PICTURES)}", parameter="picture")
    check_folder_of(picture, "picture")
    if picture.is_dir():
        raise InputError(f"picture is {picture}, which is a folder; give the name of a file", parameter="picture")


def _raced(request: Request, errors: Any, quiet: bool) -> Report:
    """Run the races, with a bar on a terminal."""
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=errors,
        transient=True,
        disable=quiet or not errors.is_terminal,
    ) as progress:
        task = progress.add_task("building the layers", total=None)
        return run_bench(
            request, lambda what, done, races: progress.update(task, description=what, completed=done, total=races)
        )


def _place(request: Request) -> str:
    cpu = request.device.type == "cpu"
    name = cpu_model() if cpu else torch.cuda.get_device_name(request.device)
    return f"{name}, PyTorch {torch.__version__}, sparsekern {sparsekern.__version__}"


def _contents(report: Report, place: str) -> dict[str, Any]:
    return {
        "place": place,
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "rows": report.rows,
        "break_even": [vars(even) for even in break_evens(report.rows)],
        "notes": report.notes,
        "busy": report.busy,
    }


def _print(request: Request, report: Report, place: str, picture: Path | None) -> None:
    console = PlainConsole()
    if not console.is_terminal:
        console.width = WIDTH
    if request.model is None:
        for group, rows in groups(report.rows).items():
            console.print(_table(group_title(group), table_cells(rows)))
    else:
        kinds = dict.fromkeys((row["dtype"], row["threads"]) for row in report.rows)
        for dtype, threads in kinds:
            rows = [row for row in report.rows if (row["dtype"], row["threads"]) == (dtype, threads)]
            title = group_title((f"{request.model}, forward + backward", dtype, threads))
            console.print(_table(title, model_cells(rows)))
    lines = [place, f"x: times as fast as dense, {SLOWER} where it is not"]
    if request.model is None:
        lines[-1] += "; in parentheses the quartiles"
        lines.append("break-even: interpolated linearly between the measured times as fractions of the dense one")
    else:
        lines.append("all layers: each as often as it occurs, those that cannot be sparse dense")
    lines += report.notes
    lines += [] if picture is None else [f"picture: {picture}"]
    say("\n".join(lines))
    if report.busy is not None:
        say(f"warning: {report.busy}")


def _table(title: str, cells: Cells) -> Table:
    """Return a table; cells that are slower than dense are red on a terminal."""
    heading, lines = cells
    made = Table(title=title, title_justify="left", title_style="bold")
    for name in heading:
        made.add_column(name, justify="left" if name in ("pass", "layer") else "right", no_wrap=True)
    for line, following in zip(lines, [*lines[1:], None], strict=True):
        ends = following is None or following[0] != line[0]
        made.add_row(*(Text(cell, style="red" if SLOWER in cell else "") for cell in line), end_section=ends)
    return made
