"""The page of a run: one HTML file that loads nothing else, made of the run's folder and the template ``page.html``."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsekern.analysis import Summary
from sparsekern.lab.config import Config
from sparsekern.lab.history import Frame, film
from sparsekern.lab.options import OPTIONS
from sparsekern.lab.papers import deviations, find_paper
from sparsekern.lab.recipes import find
from sparsekern.lab.report.charts import (
    DROPPED,
    EMPTY,
    GROWN,
    KEPT,
    curve_chart,
    curves_of,
    layer_chart,
    panels,
    png,
    shades,
)
from sparsekern.lab.report.pictures import network_labels, run_title
from sparsekern.lab.report.tables import count, printable, result_cells, result_notes, written_texts
from sparsekern.lab.results import summarise
from sparsekern.lab.store import Record
from sparsekern.lab.tasks import metric_of

MARK = "<!doctype html><!-- sparsekern report -->"
"""The beginning of every page, which distinguishes it from any other file."""

FILM_BYTES = 2**20
"""Bytes of all block maps in a page, at most: it stays below 2 MB."""

LEGEND = (
    (KEPT, "block, there from the start"),
    (GROWN, "block, grown since"),
    (DROPPED, "left since the start, empty now"),
    (EMPTY, "empty: not stored, not computed"),
)

MOVES = {"churn": "churn: moved by the last update", "itop": "ITOP: ever used", "kept": "kept from the start"}
"""Title of the chart of each metric of a method that the page shows."""

PARTS = {"values": "values_bytes", "gradient": "gradient_bytes", "optimizer": "state_bytes", "index": "index_bytes"}
"""Parts of the memory of a sparse layer, and their names in an account."""

ACCOUNT = (
    *("name", "kind", "shape", "block", "blocks", "cells", "sparsity", "parameters", "flops", "dense_flops"),
    *(*PARTS.values(), "total_bytes", "dense_bytes"),
)
"""Numbers of a layer for ``--json``."""


def render(contents: Mapping[str, Any]) -> str:
    """Return the page as HTML.

    Args:
        contents: from :func:`page_contents`. Its text is plain and is escaped here; charts are SVG.
    """
    import jinja2
    from markupsafe import Markup

    def safe(value: Any) -> Any:
        return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=safe,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["digits"] = lambda value: f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return f"{MARK}\n{environment.get_template('page.html').render(contents)}\n"


def results_so_far(record: Record, sizes: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the content of ``results.json``, or what it would be after the epochs done; None before the first one.

    Args:
        record: of the run.
        sizes: of the networks, for a run that is not finished.
    """
    if record.results is not None:
        return record.results
    if sizes is None or not record.compared:
        return None
    numbers = summarise(record.compared, sizes, metric_of(record.rows[0]))
    first = next(iter(numbers["networks"].values()))
    seeds = len(first[metric_of(first).key]["by_seed"])
    config = record.config.to_json() | {"seeds": seeds}  # those that the metric is the mean of
    return {"config": config, "data": record.data, "environment": record.environment} | numbers


def page_contents(
    record: Record, results: dict[str, Any] | None, account: Summary | None, measured: str
) -> dict[str, Any]:
    """Return what the template shows.

    Args:
        record: of the run.
        results: :func:`results_so_far`.
        account: of the layers; None where it is not known.
        measured: on what machine the layers were timed; empty where they were not.
    """
    config = record.config
    return {
        "title": run_title(config, record.data["name"]).replace(" x ", "\u00a0x\u00a0"),
        "status": _status(record),
        "summary": "No epoch is finished yet." if results is None else _sentence(results),
        "missing": record.missing,
        "paper": config.paper,
        "deviations": deviations(config, record.data),
        "table": None if results is None else result_cells(results),
        "notes": [] if results is None else result_notes(results),
        "metric": metric_of(record.rows[0]) if record.rows else None,
        "charts": _charts(record),
        "written": {} if results is None else written_texts(results),
        "legend": LEGEND,
        "films": [] if record.history is None else _films(record, record.history),
        "moves": _moves(record),
        "layers": [] if account is None else _layers(account),
        "memory": None if account is None or not config.sparse else _memory(account),
        "measured": measured,
        "command": command_of(config),
        "settings": {
            "Configuration": _flat(config.to_json()),
            "Data": record.data,
            "Environment of the run": record.environment,
        },
    }


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a run with those of its method and its network among them."""
    parts = ("options", "network")
    flat = {name: value for name, value in values.items() if name not in parts}
    return flat | {name: value for part in parts for name, value in values.get(part, {}).items()}


def _status(record: Record) -> str:
    config = record.config
    each = f"{count(config.seeds, 'seed')}, {count(config.epochs or 0, 'epoch')} each"
    if record.results is not None:
        return f"Finished: {each}."
    if not record.rows:
        return f"Not finished: {each}; no epoch is done."
    last = record.rows[-1]
    return f"Not finished: {each}; seed {last['seed'] + 1} has done epoch {last['epoch']}."


def _sentence(results: dict[str, Any]) -> str:
    networks, comparison = results["networks"], results.get("comparison")
    (name, first), *_ = networks.items()
    metric = metric_of(first)
    reached = f"The {name} network reaches a {metric.title} of {metric.text(first[metric.key]['mean'])}"
    absent = ""
    if "sparse" in networks:
        absent = f" ({100 * networks['sparse']['network_sparsity']:.1f} % of all weights are absent)"
    if comparison is None:
        return f"{reached} and stores {first['stored_parameters']:,} numbers{absent}."
    text = (
        f"{reached}, its dense twin {metric.text(networks['dense'][metric.key]['mean'])}. It stores "
        f"{_times(comparison['parameters_dense_over_sparse'], 'fewer', 'more')} numbers{absent}, needs "
        f"{_times(comparison['bytes_dense_over_sparse'], 'less', 'more')} memory to train"
    )
    ratio = comparison["time_sparse_over_dense"]["median"]
    return text + ("." if ratio is None else f", and a training step is {_times(1 / ratio, 'faster', 'slower')}.")


def _times(ratio: float, better: str, worse: str) -> str:
    return f"{ratio:.2f} times {better}" if ratio >= 1 else f"{1 / ratio:.2f} times {worse}"


def command_of(config: Config) -> str:
    """Return the command that trains the same again."""
    base: dict[str, Any] = {"recipe": config.recipe, "preset": config.preset}
    if config.paper is not None:
        base = dict(find_paper(config.paper).values)
    usual, values = Config(**base).to_json(), config.to_json()
    always = "recipe" if config.paper is None else "paper"
    given = {name: value for name, value in values.items() if name == always or value != usual[name]}
    words = ["sparsekern", "train"]
    for name, value in _flat(given | {"options": values["options"]}).items():
        option = name.replace("_", "-")
        if type(value) is bool:
            words.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, dict):
            words += [f"--{option}", ",".join(f"{kind}={number}" for kind, number in value.items())]
        elif value is not None:
            words += [f"--{option}", str(value)]
    return shlex.join(words)


def _charts(record: Record) -> list[str]:
    if not record.rows:
        return []
    metric, labels = metric_of(record.rows[0]), network_labels(record.config)
    return [
        curve_chart(curves_of(record.rows, labels, metric.key, metric.scale), metric.label),
        curve_chart(curves_of(record.rows, labels, "loss"), "training loss", log=True),
    ]


def _moves(record: Record) -> list[str]:
    """Return the charts of the method's metrics, of the first seed's sparse network."""
    rows = [row for row in record.rows if row["network"] == "sparse" and row["seed"] == 0]
    charts = []
    for key, title in MOVES.items():
        names = [name.partition("/")[2] for name in (rows[0] if rows else {}) if name.startswith(f"{key}/")]
        lines = {
            name: [100 * row[f"{key}/{name}"] for row in rows]
            for name in names
            if name != "global" and all(f"{key}/{name}" in row for row in rows)
        }
        if lines:
            charts.append(layer_chart(lines, title))
    return charts


def _films(record: Record, history: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the block maps of the layers over time, with fewer and fewer frames until they are small enough."""
    every = 1
    while True:
        films = [_film(record, layer, history, every) for layer in history["layers"]]
        size = sum(len(image) for one in films for *_, image in one["frames"])
        if size <= FILM_BYTES or all(len(one["frames"]) <= 2 for one in films):
            return films
        every *= 2


def _film(record: Record, layer: str, history: dict[str, Any], every: int) -> dict[str, Any]:
    """Return the film of a layer; its frames are ``(caption, short caption, image)``, oldest first."""
    about = history["layers"][layer]
    kernel = None if about["kernel"] is None else tuple(about["kernel"])
    start, frames = film(history, layer)
    frames = [frame for i, frame in enumerate(frames) if i % every == 0 or i == len(frames) - 1]
    if about["tile"] > 1:  # the shade of a tile already tells how many blocks it has
        start = start.new_zeros(start.shape)
    fullest = max(int(frame.now.max()) for frame in frames)
    steps = math.ceil(find(record.config.recipe).task.examples_of(record.data) / record.config.batch_size)
    shown = []
    for number, frame in enumerate(frames):
        image = shades(frame.now.numpy(), frame.kept.numpy(), start.numpy(), fullest, kernel)
        newest = number == len(frames) - 1
        shown.append((*_captions(frame, steps, newest=newest, finished=record.results is not None), png(image)))
    height, width = panels(start.numpy(), kernel, 0).shape
    return {
        "layer": layer,
        "about": _about(about, record),
        "width": width,
        "height": height,
        "frames": shown,
        "thumbnails": [shown[i] for i in sorted({round(i * (len(shown) - 1) / 4) for i in range(5)})],
    }


def _captions(frame: Frame, steps: int, *, newest: bool, finished: bool) -> tuple[str, str]:
    """Return the caption of a frame, long and short; an epoch has that many steps."""
    now, kept = frame.blocks
    when = "before training" if frame.update == 0 else f"after update {frame.update}, step {frame.step:,}"
    short = "start" if frame.update == 0 else f"update {frame.update}, epoch {frame.step / steps:.1f}"
    if newest and frame.update:
        short += " (the last one)" if finished else " (so far)"
    moved = f"{100 * kept / max(1, now):.0f} % of them where blocks were at the start"
    return f"{when}, epoch {frame.step / steps:.1f}: {now:,} blocks, {moved}", short


def _about(about: dict[str, Any], record: Record) -> str:
    """Say what a pixel, a row and a column of a block map are."""
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
    pooled = record.config.method in OPTIONS["pool"].methods
    extra = " The method stores candidates, of which it keeps a part at its last update." if pooled else ""
    return f"{cell}; {where}.{extra}"


def _layers(account: Summary) -> list[tuple[Any, tuple[int, int], Any]]:
    """Return each layer, and its bytes and milliseconds beside those of a dense layer of its size."""
    return [
        (row, (row.total_bytes if row.block else row.dense_bytes, row.dense_bytes), account.milliseconds.get(row.name))
        for row in account.rows
    ]


def _memory(account: Summary) -> tuple[dict[str, int], int]:
    """Return the bytes of each part of the sparse layers together, and of the same layers dense."""
    sparse = [row for row in account.rows if row.block]
    parts = {part: sum(getattr(row, name) for row in sparse) for part, name in PARTS.items()}
    return parts, sum(row.dense_bytes for row in sparse)


def page_values(record: Record, results: dict[str, Any] | None, account: Summary | None) -> dict[str, Any]:
    """Return the numbers of the page as plain values, for ``--json``."""
    layers = [] if account is None else account.rows
    times = {} if account is None else account.milliseconds
    frames = [] if record.history is None else record.history["frames"]
    return {
        "finished": record.results is not None,
        "results": results,
        "rows": record.rows,
        "layers": [
            {name: getattr(row, name) for name in ACCOUNT} | {"milliseconds": times.get(row.name)} for row in layers
        ],
        "topology": [{key: frame[key] for key in ("step", "update", "blocks")} for frame in frames],
        "missing": record.missing,
    }
