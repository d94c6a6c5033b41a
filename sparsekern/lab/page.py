"""What the page of a run says, from its folder. :mod:`sparsekern.lab.report.html` draws it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from typing import Any

from sparsekern.analysis import Summary
from sparsekern.lab.config import Config
from sparsekern.lab.history import Frame, film
from sparsekern.lab.report.blocks import panels, png, shades
from sparsekern.lab.report.charts import curve_chart, layer_chart
from sparsekern.lab.report.html import BlockFilm, LayerRow, Page
from sparsekern.lab.report.plots import Curves
from sparsekern.lab.results import summarise
from sparsekern.lab.store import Record
from sparsekern.training import METHODS

MIB = 2**20

FILM_BYTES = 2**20
"""Of all block maps in a page, at most: with them it stays below 2 MB."""

PARTS = {"values": "values_bytes", "gradient": "gradient_bytes", "optimizer": "state_bytes", "index": "index_bytes"}
"""What the memory of a sparse layer consists of, and its name in an account."""


def results_so_far(record: Record, sizes: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return what ``results.json`` holds, or what it would hold after the epochs done; None where there are none.

    Args:
        record: of the run.
        sizes: of the networks, for a run that is not finished.
    """
    if record.results is not None:
        return record.results
    if sizes is None or not record.compared:
        return None
    numbers = summarise(record.compared, sizes)
    seeds = len(next(iter(numbers["networks"].values()))["test_accuracy"]["by_seed"])
    config = record.config.to_json() | {"seeds": seeds}  # those that the accuracy is the mean of
    return {"config": config, "data": record.data, "environment": record.environment} | numbers


def page_of(
    record: Record,
    results: dict[str, Any] | None,
    table: tuple[Sequence[str], Sequence[Sequence[str]]] | None,
    notes: Sequence[str],
    account: Summary | None,
    measured: str,
) -> Page:
    """Return the page.

    Args:
        record: of the run.
        results: :func:`results_so_far`.
        table, notes: of them, in words.
        account: of the layers; None where it is not known.
        measured: on what machine the layers were timed; empty where they were not.
    """
    config = record.config
    films = [] if record.history is None else _films(record)
    return Page(
        title=_title(record),
        status=_status(record),
        summary="No epoch is finished yet." if results is None else _sentence(results),
        table=table,
        notes=notes,
        charts=_charts(record),
        films=films,
        moves=_moves(record),
        layers=[] if account is None else _layers(account),
        memory=None if account is None or not config.sparse else _memory(account),
        measured=measured,
        command=command_of(config),
        settings={
            "Configuration": _flat(config.to_json()),
            "Data": record.data,
            "Environment of the run": record.environment,
        },
        missing=record.missing,
    )


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a run with those of its method among them."""
    own: dict[str, Any] = values["options"]
    return {name: value for name, value in values.items() if name != "options"} | own


def _title(record: Record) -> str:
    config, side = record.config, record.config.block_size
    unit = "single weights" if side == 1 else f"blocks of {side}\u00a0x\u00a0{side}"  # on one line
    sparse = f"{100 * config.sparsity:.4g} % sparse in {unit} ({config.method_title})" if config.sparse else "dense"
    twin = ", beside its dense twin" if config.sparse and config.dense else ""
    return f"{record.data.get('name', 'data')}: {config.network_title}, {sparse}{twin}"


def _status(record: Record) -> str:
    config = record.config
    seeds = "1 seed" if config.seeds == 1 else f"{config.seeds} seeds"
    epochs = "1 epoch" if config.epochs == 1 else f"{config.epochs} epochs"
    if record.results is not None:
        return f"Finished: {seeds}, {epochs} each."
    if not record.rows:
        return f"Not finished: no epoch of {epochs} is done."
    last = record.rows[-1]
    return f"Not finished: {seeds}, {epochs} each; seed {last['seed'] + 1} has done epoch {last['epoch']}."


def _sentence(results: dict[str, Any]) -> str:
    networks, comparison = results["networks"], results.get("comparison")
    name, first = next(iter(networks.items()))
    accuracy = f"The {name} network classifies {100 * first['test_accuracy']['mean']:.2f} % of the test images rightly"
    if comparison is None:
        return f"{accuracy} and stores {first['stored_parameters']:,} numbers{_absent(networks)}."
    text = (
        f"{accuracy}, its dense twin {100 * networks['dense']['test_accuracy']['mean']:.2f} %. "
        f"It stores {_times(comparison['parameters_dense_over_sparse'], 'fewer', 'more')} numbers"
        f"{_absent(networks)}, needs "
        f"{_times(comparison['bytes_dense_over_sparse'], 'less', 'more')} memory to train"
    )
    ratio = comparison["time_sparse_over_dense"]["median"]
    return text + ("." if ratio is None else f", and a training step is {_times(1 / ratio, 'faster', 'slower')}.")


def _absent(networks: dict[str, Any]) -> str:
    """Return how sparse the whole network is, in brackets; nothing where no sparse one was trained."""
    share = networks.get("sparse", {}).get("network_sparsity")  # older runs have none
    return "" if share is None else f" ({100 * share:.1f} % of all weights are absent)"


def _times(ratio: float, better: str, worse: str) -> str:
    return f"{ratio:.2f} times {better}" if ratio >= 1 else f"{1 / ratio:.2f} times {worse}"


def command_of(config: Config) -> str:
    """Return the command that trains the same again."""
    usual = Config(recipe=config.recipe, preset=config.preset).to_json()
    values = config.to_json()
    given = {name: value for name, value in values.items() if name == "recipe" or value != usual[name]}
    words = ["sparsekern", "train"]
    for name, value in _flat(given | {"options": values["options"]}).items():
        option = name.replace("_", "-")
        if type(value) is bool:
            words.append(f"--{option}" if value else f"--no-{option}")
        elif value is not None:
            words += [f"--{option}", str(value)]
    return shlex.join(words)


def _charts(record: Record) -> list[str]:
    if not record.rows:
        return []
    names = {"sparse": f"{100 * record.config.sparsity:.4g} % sparse", "dense": "dense twin"}

    def curves(key: str, scale: float) -> list[Curves]:
        found = []
        for network in record.config.networks:
            by_seed: dict[int, list[float]] = {}
            for row in record.rows:
                if row["network"] == network:
                    by_seed.setdefault(row["seed"], []).append(scale * row[key])
            if by_seed:
                found.append(Curves(names[network], list(by_seed.values())))
        return found

    return [
        curve_chart(curves("test_accuracy", 100), "test accuracy (%)"),
        curve_chart(curves("loss", 1), "training loss", log=True),
    ]


def _moves(record: Record) -> list[str]:
    """Return the charts of what the method tells, of the first seed's sparse network."""
    rows = [row for row in record.rows if row["network"] == "sparse" and row["seed"] == 0]
    titles = {"churn": "churn: moved by the last update", "itop": "ITOP: ever used", "kept": "kept from the start"}
    charts = []
    for key, title in titles.items():
        names = [name.partition("/")[2] for name in (rows[0] if rows else {}) if name.startswith(f"{key}/")]
        lines = {
            name: [100 * row[f"{key}/{name}"] for row in rows]
            for name in names
            if name != "global" and all(f"{key}/{name}" in row for row in rows)
        }
        if lines:
            charts.append(layer_chart(lines, title))
    return charts


def _films(record: Record) -> list[BlockFilm]:
    """Return the films, thinned out alike until they are small enough."""
    assert record.history is not None
    history, every = record.history, 1
    while True:
        films = [_film(record, layer, history, every) for layer in history["layers"]]
        size = sum(len(image) for film_ in films for *_, image in film_.frames)
        if size <= FILM_BYTES or all(len(film_.frames) <= 2 for film_ in films):
            return films
        every *= 2


def _film(record: Record, layer: str, history: dict[str, Any], every: int) -> BlockFilm:
    about = history["layers"][layer]
    kernel = None if about["kernel"] is None else tuple(about["kernel"])
    start, frames = film(history, layer)
    frames = [frame for i, frame in enumerate(frames) if i % every == 0 or i == len(frames) - 1]
    if about["tile"] > 1:  # the shade of a tile already tells how many blocks it has
        start = start.new_zeros(start.shape)
    fullest = max(int(frame.now.max()) for frame in frames)
    steps = math.ceil(record.data["train_images"] / record.config.batch_size)
    shown = []
    for number, frame in enumerate(frames):
        image = shades(frame.now.numpy(), frame.kept.numpy(), start.numpy(), fullest, kernel)
        newest = number == len(frames) - 1
        shown.append((*_captions(frame, steps, newest=newest, finished=record.results is not None), png(image)))
    height, width = panels(start.numpy(), kernel, 0).shape
    return BlockFilm(layer, _about(about, record), width, height, shown)


def _captions(frame: Frame, steps: int, *, newest: bool, finished: bool) -> tuple[str, str]:
    """Return what is said of a frame, and the same in short; an epoch has so many steps."""
    now, kept = frame.blocks
    when = "before training" if frame.update == 0 else f"after update {frame.update}, step {frame.step:,}"
    short = "start" if frame.update == 0 else f"update {frame.update}, epoch {frame.step / steps:.1f}"
    if newest and frame.update:
        short += " (the last one)" if finished else " (so far)"
    moved = f"{100 * kept / max(1, now):.0f} % of them where blocks were at the start"
    return f"{when}, epoch {frame.step / steps:.1f}: {now:,} blocks, {moved}", short


def _about(about: dict[str, Any], record: Record) -> str:
    (bo, bi), tile, kernel = about["block"], about["tile"], about["kernel"]
    unit = "features" if kernel is None else "channels"
    block = "a single weight" if (bo, bi) == (1, 1) else f"a block of {bo} x {bi} weights"
    cell = f"A cell is {block}"
    if tile > 1:
        cell = f"A cell is a tile of {tile} x {tile} places, each for {block}; the more of them are stored, the darker"
    where = f"down: output {unit}, across: input {unit}; {about['rows']:,} x {about['cols']:,} places for blocks"
    if math.prod(kernel or ()) != 1:
        where = (
            f"{' x '.join(map(str, kernel))} panels, one for each place of the kernel; in each panel, {where} in all"
        )
    if about["groups"] > 1:
        where += f"; the {about['groups']} groups lie below each other"
    pool = METHODS[record.config.method].pool
    extra = "" if pool == 1 else " The method stores candidates, of which it keeps the likeliest at its last update."
    return f"{cell}; {where}.{extra}"


def _layers(account: Summary) -> list[LayerRow]:
    rows = []
    for row in account.rows:
        block = "dense" if row.block is None else f"{row.blocks:,} of {row.cells:,} ({row.block[0]} x {row.block[1]})"
        own = row.dense_bytes if row.block is None else row.total_bytes
        rows.append(
            LayerRow(
                name=row.name,
                kind=row.kind,
                shape=" x ".join(map(str, row.shape)),
                blocks=block,
                sparsity=row.sparsity,
                mebibytes=(own / MIB, row.dense_bytes / MIB),
                milliseconds=account.milliseconds.get(row.name),
            )
        )
    return rows


def _memory(account: Summary) -> tuple[dict[str, float], float]:
    sparse = [row for row in account.rows if row.block is not None]
    parts = {what: sum(getattr(row, name) for row in sparse) / MIB for what, name in PARTS.items()}
    return parts, sum(row.dense_bytes for row in sparse) / MIB


def values_of(record: Record, results: dict[str, Any] | None, account: Summary | None) -> dict[str, Any]:
    """Return the numbers of the page as plain values, for ``--json``."""
    layers = [] if account is None else account.rows
    times = {} if account is None else account.milliseconds
    names = ["name", "kind", "shape", "block", "blocks", "cells", "sparsity", "parameters", "flops", "dense_flops"]
    names += ["values_bytes", "gradient_bytes", "state_bytes", "index_bytes", "total_bytes", "dense_bytes"]
    frames = [] if record.history is None else record.history["frames"]
    return {
        "finished": record.results is not None,
        "results": results,
        "rows": record.rows,
        "layers": [
            {name: getattr(row, name) for name in names} | {"milliseconds": times.get(row.name)} for row in layers
        ],
        "topology": [{key: frame[key] for key in ("step", "update", "blocks")} for frame in frames],
        "missing": record.missing,
    }
