"""``sparsekern inspect``: what a checkpoint holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

from sparsekern.cli.shell import PlainConsole, error_console, explained, say, stopped
from sparsekern.errors import InputError
from sparsekern.files.size_limits import DEFAULT, Limits
from sparsekern.files.states import StoredLayer, stored_layers
from sparsekern.files.weight_files import FORMAT_VERSION, read_state
from sparsekern.lab import checkpoint
from sparsekern.lab.options import percent
from sparsekern.lab.report.tables import printable
from sparsekern.lab.store import CONFIG, check_run, read_config
from sparsekern.nn.layer_state import STORED

HEADINGS = ("tensor", "shape", "blocks", "of size", "sparse", "dtype", "bytes")

GAP = 2
"""Letters between two columns."""


def inspect(
    source: Annotated[
        Path,
        typer.Argument(help="A file of weights, a checkpoint folder or a run folder.", metavar="CHECKPOINT_OR_RUN"),
    ],
    network: Annotated[str, typer.Option(help="Of a run: sparse or dense.")] = "sparse",
    seed: Annotated[int, typer.Option(help="Of a run: which seed.")] = 0,
    max_gib: MaxGib = DEFAULT.gib,
    max_tensors: MaxTensors = DEFAULT.tensors,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show the layers of a checkpoint: shapes, blocks, sparsity, dtypes, bytes. Nothing in the file is executed."""
    with explained(error_console(), stopped, inspect):
        run = _run(source) if (source / CONFIG).is_file() else None
        file = weights_file(source, network, seed)
        state = read_state(file, Limits(max_gib, max_tensors))
        found = {"file": str(file), "file_bytes": file.stat().st_size, **describe_state(state)}
        if run is not None:
            found["run"] = run
    if as_json:
        say(json.dumps(found))
    else:
        _print(found)


def describe_state(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the sparse layers, the other tensors, and the sums of a state, as plain values.

    Of a layer whose matrix the file does not say, ``shape`` and ``sparsity`` are None.
    """
    layers = stored_layers(state)
    rows = [_layer(layer) for layer in layers.values()]
    others = [
        {"name": key, "shape": list(tensor.shape), "dtype": _dtype(tensor), "bytes": tensor.nbytes}
        for key, tensor in state.items()
        if key.rpartition(".")[0] not in layers or key.rpartition(".")[2] not in (*STORED, "weight")
    ]
    version = None if not layers else FORMAT_VERSION if all(layer.described for layer in layers.values()) else 1
    parameters = sum(layer.topology.elements() for layer in layers.values())
    return {
        "format_version": version,
        "layers": rows,
        "tensors": others,
        "stored_weights": parameters,
        "bytes": sum(row["bytes"] for row in rows + others),
    }


def _layer(layer: StoredLayer) -> dict[str, Any]:
    topology = layer.topology
    return {
        "name": layer.name,
        "shape": list(topology.grid.weight_shape) if layer.described else None,
        "block_size": list(topology.grid.block),
        "blocks": topology.blocks(),
        "slots": topology.slots,
        "sparsity": topology.sparsity() if layer.described else None,
        "dtype": _dtype(layer.values),
        "bytes": sum(layer.bytes().values()),
    }


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _run(folder: Path) -> dict[str, Any]:
    config = read_config(folder).config.to_json()
    newest = {seed: checkpoint.latest(checkpoint.seed_folder(folder, seed)) for seed in saved_seeds(folder)}
    return {"config": config, "checkpoints": {str(seed): str(path) for seed, path in newest.items()}}


def _print(found: dict[str, Any]) -> None:
    console = PlainConsole()
    rows = [_layer_cells(row) for row in found["layers"]]
    for row in found["tensors"]:
        rows.append([printable(row["name"]), _times(row["shape"]), "", "", "", row["dtype"], f"{row['bytes']:,}"])
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    table.add_column(HEADINGS[0], no_wrap=True)
    for heading in HEADINGS[1:]:
        table.add_column(heading, justify="right", no_wrap=True)
    names, *others = ([len(cell) for cell in column] for column in zip(HEADINGS, *rows, strict=True))
    used = sum(max(column) + GAP for column in others)
    parts = [len(part) for row in rows for part in row[0].split(".")]
    room = max(console.width - used, max(parts, default=0) + 1, len(HEADINGS[0]))
    console.width = max(
        console.width, used + min(room, max(names))
    )  # a narrow terminal breaks lines, which loses nothing
    for name, *cells in rows:
        table.add_row(in_parts(name, room), *cells)
    version = "no sparse layer" if found["format_version"] is None else f"format version {found['format_version']}"
    say(f"{found['file']}: {found['file_bytes']:,} bytes, {version}")
    if "run" in found:
        config = found["run"]["config"]
        say(f"run: recipe {config['recipe']}, {config['method']}, {percent(config['sparsity'])} sparse")
    console.print(table)
    say(f"{found['stored_weights']:,} weights in blocks; {found['bytes']:,} bytes in all tensors")


def _layer_cells(row: dict[str, Any]) -> list[str]:
    free = f" + {row['slots'] - row['blocks']} free" if row["slots"] > row["blocks"] else ""
    return [
        printable(row["name"]) or "(the layer)",
        "?" if row["shape"] is None else _times(row["shape"]),
        f"{row['blocks']:,}{free}",
        _times(row["block_size"]),
        "?" if row["sparsity"] is None else f"{100 * row['sparsity']:.2f} %",
        row["dtype"],
        f"{row['bytes']:,}",
    ]


def in_parts(name: str, width: int) -> str:
    """Return a dotted name in lines of at most ``width`` letters, broken at its dots; a longer part stays whole."""
    lines = [""]
    for part in name.replace(".", ".\n").split("\n"):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _times(shape: list[int]) -> str:
    return " x ".join(map(str, shape)) or "()"


MaxGib = Annotated[
    float,
    typer.Option(help="GiB that the file may ask for; one of more than a sixteenth of that, 16 times its own size."),
]
MaxTensors = Annotated[int, typer.Option(help="Tensors that the file may hold.")]

WAYS = "a file of weights, a checkpoint folder or a run folder"


def weights_file(path: Path, network: str, seed: int) -> Path:
    """Return the file of weights that a path stands for: of a run the newest checkpoint's.

    Raises:
        ValueError: there is none.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist; give {WAYS}")
    if path.is_file():
        return path
    folder: Path | None = path
    if (path / CONFIG).is_file():
        folder = checkpoint.latest(checkpoint.seed_folder(path, seed))
        if folder is None:
            seeds = ", ".join(str(number) for number in saved_seeds(path)) or "none"
            raise InputError(
                f"seed is {seed}, which has no checkpoint in {path}; those that have one: {seeds}", parameter="seed"
            )
    elif not any(path.glob("*.safetensors")):
        check_run("the source", path, WAYS)
    assert folder is not None
    file = folder / f"{network}.safetensors"
    if not file.is_file():
        there = ", ".join(sorted(found.stem for found in folder.glob("*.safetensors"))) or "none"
        raise InputError(
            f"network is {network!r}, of which {folder} has no weights; it has those of: {there}", parameter="network"
        )
    return file


def saved_seeds(run: Path) -> list[int]:
    """Return the seeds of a run that have a checkpoint."""
    names = (found.name.removeprefix("seed-") for found in (run / "checkpoints").glob("seed-*"))
    seeds = sorted(int(name) for name in names if name.isdecimal())
    return [seed for seed in seeds if checkpoint.latest(checkpoint.seed_folder(run, seed)) is not None]
