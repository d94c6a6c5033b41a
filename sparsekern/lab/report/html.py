"""One page about a training, in one file that loads nothing else. Only draws: every value is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparsekern.lab.report.blocks import DROPPED, EMPTY, GROWN, KEPT
from sparsekern.lab.report.html_style import SCRIPT, STYLE
from sparsekern.lab.report.scales import bars, stack
from sparsekern.lab.report.text import escape

MARK = "<!doctype html><!-- sparsekern report -->"
"""The beginning of every page, by which it is told from any other file."""

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""What a browser lets the page load: nothing from elsewhere."""

THUMBNAIL, LARGE = 132, 460
"""Pixels of the screen that a block map takes, at least half of it."""


@dataclass(frozen=True)
class BlockFilm:
    """The block maps of one layer over time.

    Attributes:
        layer: its name.
        about: what a pixel is, and what rows and columns are, in words.
        width, height: of the images, in pixels.
        frames: ``(caption, short caption, image as a data: address)``, oldest first; one or more.
    """

    layer: str
    about: str
    width: int
    height: int
    frames: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class LayerRow:
    """One layer: what it stores and how long it takes, beside the dense layer of its size.

    ``milliseconds`` is ``(sparse, dense)`` of forward and backward, None where it was not measured.
    """

    name: str
    kind: str
    shape: str
    blocks: str
    sparsity: float
    mebibytes: tuple[float, float]
    milliseconds: tuple[float, float] | None


@dataclass(frozen=True)
class Page:
    """Everything that the page says. Texts are plain: they are escaped here. Charts are SVG.

    Attributes:
        title, status, summary: what was trained, how far it is, and what came out, a sentence each.
        table: the result: a heading and rows of cells.
        notes: below the table.
        charts: accuracy and loss; empty where no epoch is finished.
        films: block maps.
        moves: charts of churn, ITOP and kept places.
        layers: in the model's order.
        memory: ``{what: mebibytes}`` of the sparse layers, and of the same layers dense.
        measured: where and how the times of the layers were taken; empty where they were not.
        command: that trains this again.
        settings: tables of what the run was asked to do and where it ran, by heading.
        missing: what the page cannot show, and why.
    """

    title: str
    status: str
    summary: str
    table: tuple[Sequence[str], Sequence[Sequence[str]]] | None = None
    notes: Sequence[str] = ()
    charts: Sequence[str] = ()
    films: Sequence[BlockFilm] = ()
    moves: Sequence[str] = ()
    layers: Sequence[LayerRow] = ()
    memory: tuple[Mapping[str, float], float] | None = None
    measured: str = ""
    command: str = ""
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    missing: Sequence[str] = ()


def render(page: Page) -> str:
    """Return the page as HTML."""
    parts = [
        _header(page),
        _missing(page.missing),
        _results(page),
        _curves(page.charts),
        _films(page.films),
        _moves(page.moves),
        _layers(page),
        _memory(page.memory),
        _settings(page),
    ]
    return (
        f'{MARK}\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(page.title)}</title>\n<style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(part for part in parts if part)
        + f"\n</main>\n<script>{SCRIPT}</script></body></html>\n"
    )


def _section(heading: str, words: str, body: str) -> str:
    return f'<section><h2>{escape(heading)}</h2>\n<p class="words">{words}</p>\n{body}</section>'


def _header(page: Page) -> str:
    return (
        f'<header><h1>{escape(page.title)}</h1><p class="status">{escape(page.status)}</p>'
        f'<p class="summary">{escape(page.summary)}</p></header>'
    )


def _missing(missing: Sequence[str]) -> str:
    if not missing:
        return ""
    items = "".join(f"<li>{escape(text)}</li>" for text in missing)
    return f'<section class="missing"><h2>What this page cannot show</h2><ul>{items}</ul></section>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str) -> str:
    """Return a table of cells that are HTML already."""
    cells = "".join(f"<th>{cell}</th>" for cell in head)
    lines = "".join(
        "<tr>" + "".join(f"<{'td' if i else 'th'}>{c}</{'td' if i else 'th'}>" for i, c in enumerate(row)) + "</tr>\n"
        for row in rows
    )
    return (
        f'<div class="wide"><table class="{kind}"><thead><tr>{cells}</tr></thead><tbody>\n{lines}</tbody></table></div>'
    )


def _results(page: Page) -> str:
    if page.table is None:
        return ""
    head, rows = page.table
    table = _table([escape(c) for c in head], [[escape(c) for c in row] for row in rows], "results")
    notes = "".join(f"<li>{escape(note)}</li>" for note in page.notes)
    words = (
        "The <b>sparse</b> network stores only some blocks of its large weights and computes with nothing else. Its "
        "<b>dense</b> twin is the same network with all weights, trained beside it on the same images in the same "
        "order. <i>Training state</i> is everything that is held between two steps: weights, their gradients, the "
        "optimizer's state and the index of the blocks."
    )
    if len(head) == 2:
        words = "What the network reached and takes. This run trained it alone, with no twin to compare it with."
    return _section("Result", words, f'{table}<ul class="notes">{notes}</ul>')


def _curves(charts: Sequence[str]) -> str:
    if not charts:
        return ""
    words = (
        "Accuracy is measured on test images that no training step has seen; higher is better. Loss is the mean over "
        "the training images of an epoch, one pass over all of them; lower is better."
    )
    return _section("Learning", words, _row(charts))


def _row(charts: Sequence[str]) -> str:
    return '<div class="charts">' + "".join(f"<figure>{chart}</figure>" for chart in charts) + "</div>"


def _films(films: Sequence[BlockFilm]) -> str:
    if not films:
        return ""
    legend = "".join(
        f'<span><i style="background:{colour}"></i>{name}</span>'
        for colour, name in (
            (KEPT, "block, there from the start"),
            (GROWN, "block, grown since"),
            (DROPPED, "left since the start, empty now"),
            (EMPTY, "empty: not stored, not computed"),
        )
    )
    words = (
        "Each picture is one weight matrix seen from above: a coloured cell is a stored block, an empty one is nowhere "
        "in memory. Every so many steps the method drops the blocks it needs least and grows as many in other places; "
        "move the slider to watch it."
    )
    return _section("Where the blocks are", words, f'<p class="legend">{legend}</p>' + "".join(map(_film, films)))


def _film(film: BlockFilm) -> str:
    frames = film.frames
    large, small = (_scaled(film, side) for side in (LARGE, THUMBNAIL))
    chosen = sorted({round(i * (len(frames) - 1) / 4) for i in range(5)})
    thumbnails = "".join(
        f'<figure><img src="{frames[i][2]}" {small} alt="{escape(frames[i][0])}"><figcaption>'
        f"{escape(frames[i][1])}</figcaption></figure>"
        for i in chosen
    )
    states = "".join(f'<li data-src="{image}">{escape(caption)}</li>' for caption, _, image in frames)
    last = len(frames) - 1
    return (
        f'<div class="film"><h3>{escape(film.layer)}</h3><p class="about">{escape(film.about)}</p>'
        f'<div class="stage"><div class="player" hidden><img class="now" src="{frames[-1][2]}" {large} alt="">'
        f'<div class="control"><button type="button" aria-label="play">▶</button>'
        f'<input type="range" min="0" max="{last}" value="{last}" aria-label="time"></div>'
        f'<p class="caption">{escape(frames[-1][0])}</p></div>'
        f'<div class="thumbnails">{thumbnails}</div></div><ol class="frames" hidden>{states}</ol></div>'
    )


def _scaled(film: BlockFilm, side: int) -> str:
    """Return the size of a map on the screen: a whole number of pixels a cell, so that all cells are alike."""
    scale = max(1, side // max(film.width, film.height))
    return f'width="{scale * film.width}" height="{scale * film.height}"'


def _moves(charts: Sequence[str]) -> str:
    if not charts:
        return ""
    words = (
        "<b>Churn</b> is the share of a layer's blocks that the last update moved. <b>ITOP</b> (in-time "
        "over-parametrization) is the share of all places that ever held a block: the larger it is, the more of the "
        "dense network was tried out without ever being stored. <b>Kept</b> is the share of the first blocks' places "
        "that are still in use. Read after each epoch, of the first seed. Near the end no block moves, so that the "
        "youngest have time to learn."
    )
    return _section("How much moves", words, _row(charts))


def _layers(page: Page) -> str:
    if not page.layers:
        return ""
    timed = any(layer.milliseconds for layer in page.layers)
    most_bytes = max(max(layer.mebibytes) for layer in page.layers)
    most_time = max((max(layer.milliseconds) for layer in page.layers if layer.milliseconds), default=1.0)
    unit, scale = ("MiB", 1) if most_bytes >= 1 else ("KiB", 1024)
    head = ["layer", "weight", "blocks stored", "sparsity", f"memory, {unit}"] + ["time, ms"] * timed
    rows = []
    for layer in page.layers:
        cells = [
            f"{escape(layer.name)}<small>{escape(layer.kind)}</small>",
            escape(layer.shape),
            escape(layer.blocks),
            bars([("share", 100 * layer.sparsity, f"{100 * layer.sparsity:.1f} %")], 100),
        ]
        cells.append(_pair(layer, layer.mebibytes, most_bytes, scale))
        if timed:
            cells.append(_pair(layer, layer.milliseconds, most_time, 1))
        rows.append(cells)
    words = (
        "A line for each layer. <b>Sparsity</b> is the share of its weight that does not exist. <b>Memory</b> is what "
        "training holds for the weight: values, gradient, optimizer state and, if sparse, the index that says where "
        'the blocks are. <span class="key sparse">Blue</span> is the layer as it is, '
        '<span class="key dense">orange</span> a dense layer of its size.'
    )
    if timed:
        words += f" <b>Time</b> is forward and backward of the layer alone; {escape(page.measured)}."
    return _section("Layer by layer", words, _table(head, rows, "layers"))


def _pair(layer: LayerRow, pair: tuple[float, float] | None, most: float, scale: float) -> str:
    """Return the bars of a layer as it is and as a dense one; of a dense layer one bar, of nothing none."""
    if pair is None:
        return ""
    both = [(name, value, _digits(scale * value)) for name, value in zip(("sparse", "dense"), pair, strict=True)]
    return bars(both if layer.sparsity > 0 else both[1:], most)


def _digits(value: float) -> str:
    """Return three digits, never as a power of ten."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _memory(memory: tuple[Mapping[str, float], float] | None) -> str:
    if memory is None:
        return ""
    parts, dense = memory
    words = (
        "What training holds for the weights of the sparse layers together, against the same layers dense. Activations "
        "and the layers that stay dense take the same in both and are left out."
    )
    return _section("Memory of the sparse layers", words, stack(parts, dense))


def _settings(page: Page) -> str:
    tables = "".join(
        f"<div><h3>{escape(heading)}</h3>"
        + _table(
            ["", ""], [[escape(str(k)), escape("—" if v is None else str(v))] for k, v in entries.items()], "pairs"
        )
        + "</div>"
        for heading, entries in page.settings.items()
    )
    command = f"<pre>{escape(page.command)}</pre>" if page.command else ""
    words = "Times, and the last bits of results, depend on the machine. To train the same again:"
    return _section("Configuration and environment", words, f'{command}<div class="settings">{tables}</div>')
