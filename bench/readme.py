"""Writes the README's tables of measured speed from the committed results, so that no figure there is typed by hand.

    python -m bench.readme            write them
    python -m bench.readme --check    write nothing; exit code 1 if the README says anything else

The tables stand between two marks. Every case that they have room for is shown, whoever is faster in it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.cpu.cases import FEW_TOKENS, LARGE, SMALL, SPARSITIES, WIDE, Case
from bench.cpu.conv_cases import SHAPES, conv_case, shape_title
from bench.cpu.conv_cases import SPARSITIES as CONV_SPARSITIES
from bench.cpu.results import COMMITTED, COMMITTED_CONV, Race
from bench.cpu.table import losing, milliseconds, times
from bench.gpu.results import ROOT, Row, read_rows
from bench.gpu.table import NONE

BEGIN, END = "<!-- python -m bench.readme: begin -->", "<!-- python -m bench.readme: end -->"

README = ROOT / "README.md"


class Line(NamedTuple):
    """A line of the second table, a figure for each sparsity."""

    what: str
    op: str = "step"
    dtype: str = "fp32"
    shape: tuple[int, int, int] = WIDE
    block: int = 32
    threads: int = 1

    def case(self, sparsity: float) -> Case:
        """Return the case at a sparsity."""
        return Case(self.op, self.dtype, *self.shape, self.block, sparsity, self.threads)


def _named(shape: tuple[int, int, int]) -> str:
    return " x ".join(map(str, shape))


LINES = (
    Line("32x32, 2 threads", threads=2),
    Line("1x1, 2 threads", block=1, threads=2),
    Line("16x16", block=16),
    Line("64x64", block=64),
    Line("32x32, forward alone", "fwd"),
    Line("32x32, bfloat16", dtype="bf16"),
    Line("32x32, bfloat16, forward alone", "fwd", dtype="bf16"),
    Line(f"32x32, {_named(LARGE)}", shape=LARGE),
    Line(f"32x32, {_named(LARGE)}, 2 threads", shape=LARGE, threads=2),
    Line(f"32x32, {_named(SMALL)}", shape=SMALL),
    Line(f"1x1, {_named(SMALL)}", shape=SMALL, block=1),
)


def section(rows: list[Row]) -> str:
    """Return the text between the marks.

    Raises:
        ValueError: the rows are of more than one machine, commit or version, or there are none.
    """
    race = Race(rows)
    one = _circumstances(rows)
    parts = [
        f"{one['device']}, {one['path']}, PyTorch {one['torch']}, {one['date']}, commit {one['commit']}.\n"
        "Medians of one run in which all contestants took turns. **Bold**: slower.",
        *_main_tables(race),
        *_table(
            f"Times as fast as the best dense layer; forward + backward, {_named(WIDE)}, float32 and one thread\n"
            "where nothing else is said:",
            ["", *(f"{100 * sparsity:.0f} %" for sparsity in SPARSITIES)],
            ((line.what, [_ratio(race.row(line.case(s)), "vs_dense") for s in SPARSITIES]) for line in LINES),
        ),
        *_table(
            f"The same for few tokens, 90 % sparse, {WIDE[1]} -> {WIDE[2]} features:",
            ["tokens", *map(str, FEW_TOKENS)],
            (
                (f"{block}x{block}, {what}", [_ratio(race.row(_few(op, n, block)), "vs_dense") for n in FEW_TOKENS])
                for block in (32, 1)
                for op, what in (("fwd", "forward"), ("step", "forward + backward"))
            ),
        ),
        f"In {len(losing(race))} of {len(race.cases())} measured cases another contestant is faster.",
    ]
    return "\n\n".join(parts)


def conv_section(rows: list[Row]) -> str:
    """Return the text about the convolutions. Raises as :func:`section`."""
    race = Race(rows)
    one = _circumstances(rows)
    parts = [
        f"Convolutions: {one['device']}, {one['path']}, PyTorch {one['torch']}, {one['date']}, commit {one['commit']}.",
        *_table(
            "Times as fast as PyTorch's dense convolution, channels last; forward + backward, float32, one thread,\n"
            "kernels alone (images x channels x rows x columns -> channels):",
            ["", *(f"{100 * sparsity:.0f} %" for sparsity in CONV_SPARSITIES)],
            (
                (
                    f"{shape_title(shape)}, {block}x{block}",
                    [_ratio(race.row(conv_case("step", shape, block, s)), "vs_channels_last") for s in CONV_SPARSITIES],
                )
                for block in (32, 16, 64, 1)
                for shape in SHAPES
            ),
        ),
        f"In {len(losing(race))} of {len(race.cases())} measured cases another contestant is faster.",
    ]
    return "\n\n".join(parts)


def _circumstances(rows: list[Row]) -> Row:
    fields = ("device", "path", "torch", "commit", "date")
    found = {tuple(row[field] for field in fields) for row in rows}
    if len(found) != 1:
        said = "no rows" if not rows else f"rows of {len(found)} machines, commits or days"
        raise ValueError(f"the results have {said}; the README shows one run")
    return rows[0]


def _main_tables(race: Race) -> Iterator[str]:
    for block in (32, 1):
        found = [
            (sparsity, row)
            for sparsity in SPARSITIES
            if (row := race.row(Line("", block=block).case(sparsity))) is not None
        ]
        yield from _table(
            f"Blocks of {block}x{block}, forward + backward, {_named(WIDE)} (tokens x in x out), float32, one thread:",
            ["sparsity", "ms", "`SparseLinear`", "best dense", "x `F.linear`", "x best dense", "x best sparse"],
            ((f"{100 * sparsity:.0f} %", _cells(race, row)) for sparsity, row in found),
        )


def _cells(race: Race, row: Row) -> list[str]:
    case = Line("", block=row["block"]).case(row["sparsity"])
    others = (race.row(case, name) for name in ("SparseLinear", row["best_dense"]))
    shown = [NONE if other is None else milliseconds(other["ms"]) for other in others]
    ratios = [_ratio(row, f"vs_{against}") for against in ("linear", "dense", "sparse")]
    return [milliseconds(row["ms"]), *shown, *ratios]


def _few(op: str, tokens: int, block: int) -> Case:
    return Case(op, "fp32", tokens, *WIDE[1:], block, 0.9)


def _ratio(row: Row | None, field: str) -> str:
    if row is None or row[field] is None:
        return NONE
    return times(row[field]) if row[field] >= 1 else f"**{times(row[field])}**"


def _table(title: str, head: list[str], lines: Iterable[tuple[str, list[str]]]) -> Iterator[str]:
    """Yield a title and a table; nothing if no line of it was measured."""
    kept = [[name, *cells] for name, cells in lines if any(cell != NONE for cell in cells)]
    if kept:
        ruler = ["---", *["---:"] * (len(head) - 1)]
        yield title
        yield "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ruler, *kept))


def replaced(text: str, new: str) -> str:
    """Return a text with what is between its marks replaced.

    Raises:
        ValueError: it does not have both marks, once each and in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in before or END in after:
        raise ValueError(f"the text must have the lines {BEGIN} and {END}, once each")
    return f"{before}{BEGIN}\n\n{new}\n\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0, 1 when ``--check`` finds another text, or 2 when results or marks are missing."""
    parser = argparse.ArgumentParser(prog="python -m bench.readme", description="Write the README's tables of speed.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the README differs")
    parser.add_argument("--results", type=Path, default=COMMITTED, help="file of python -m bench.race")
    parser.add_argument(
        "--conv-results", type=Path, default=COMMITTED_CONV, help="the same with --kernel conv2d; left out if missing"
    )
    parser.add_argument("--readme", type=Path, default=README, help="file to write into")
    given = parser.parse_args(argv)
    try:
        text = given.readme.read_text()
        new = section(read_rows(given.results))
        if given.conv_results.is_file():
            new += "\n\n" + conv_section(read_rows(given.conv_results))
        wanted = replaced(text, new)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if given.check and wanted != text:
        print(f"{given.readme} does not show {given.results}; run: python -m bench.readme", file=sys.stderr)
    elif wanted != text:
        given.readme.write_text(wanted)
    return int(given.check and wanted != text)


if __name__ == "__main__":
    sys.exit(main())
