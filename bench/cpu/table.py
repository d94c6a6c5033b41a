"""The tables that end a race: every case, and every goal."""

from __future__ import annotations

from itertools import groupby

from rich.table import Table

from bench.cpu.conv_goals import ConvFinding, conv_findings
from bench.cpu.goals import SET_ON, Finding, findings
from bench.cpu.results import AnyCase, Race
from bench.gpu.results import Row
from bench.gpu.table import NONE

LOSES = "LOSES"


def case_table(race: Race) -> Table:
    """Return a line for each case: milliseconds and how many times faster the kernels are than the others."""
    cases = race.cases()
    layer, usual = (cases[0].layer, cases[0].usual[1]) if cases else ("layer", "usual")
    table = Table(title="ms of a call, median (quartiles); x: times as fast as", title_justify="left")
    for head, justify in (
        ("case", "left"),
        ("sparse", "right"),
        ("sparsekern", "right"),
        (layer, "right"),
        ("best dense", "right"),
        (f"x {usual}", "right"),
        ("x dense", "right"),
        ("x sparse", "right"),
        ("rate", "right"),
        ("", "left"),
    ):
        table.add_column(head, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for head, group in groupby(cases, key=_head):
        for case in group:
            row = race.row(case)
            if row is not None:
                table.add_row(head, f"{case.sparsity:.0%}", *_cells(race, case, row), style=_style(row))
    return table


def _cells(race: Race, case: AnyCase, row: Row) -> list[str]:
    layer = race.row(case, case.layer)
    dense = race.row(case, row["best_dense"]) if row["best_dense"] else None
    sparse = f"{times(row['vs_sparse'])} {row['best_sparse'] or ''}".rstrip()
    return [
        f"{milliseconds(row['ms'])} ({milliseconds(row['p25'])}-{milliseconds(row['p75'])})",
        NONE if layer is None else milliseconds(layer["ms"]),
        NONE if dense is None else f"{milliseconds(dense['ms'])} {dense['contestant']}",
        times(row[f"vs_{case.usual[0]}"]),
        times(row["vs_dense"]),
        sparse,
        NONE if dense is None else f"{row['rate_vs_dense']:.0%}",
        LOSES if loses(row) else "",
    ]


def goal_table(race: Race, device: str) -> Table:
    """Return a line for each goal and shape, a figure for each sparsity."""
    where = "" if SET_ON in device else f"; they were set on an {SET_ON}"
    table = Table(title=f"goals: measured / must{where}", title_justify="left")
    for head in ("against", "case"):
        table.add_column(head)
    table.add_column("measured / must, by sparsity (* reached the aim)")
    table.add_column("must")
    found_all: list[Finding | ConvFinding] = [*findings(race), *conv_findings(race)]
    for _, group in groupby(found_all, key=lambda f: (f.goal, f.case.shape, f.case.threads)):
        found = [finding for finding in group if finding.measured is not None]
        if found:
            missed = sum(finding.verdict == "MISSED" for finding in found)
            said = f"MISSED {missed} of {len(found)}" if missed else "reached"
            cells = ", ".join(_figure(finding) for finding in found)
            table.add_row(found[0].goal.what, _head(found[0].case), cells, said, style="red" if missed else "")
    return table


def _figure(finding: Finding | ConvFinding) -> str:
    assert finding.measured is not None
    mark = {"reached aim": "*", "reached must": "", "MISSED": "!"}[finding.verdict]
    return f"{finding.case.sparsity:.0%} {times(finding.measured)}/{finding.must:.3g}{mark}"


def losing(race: Race) -> list[AnyCase]:
    """Return the cases in which some dense or sparse contestant is faster than the kernels."""
    return [case for case in race.cases() if (row := race.row(case)) is not None and loses(row)]


def loses(row: Row) -> bool:
    """Return whether another contestant of the case is faster."""
    return any(row[against] is not None and row[against] < 1 for against in ("vs_dense", "vs_sparse"))


def times(ratio: float | None) -> str:
    """Return a speed-up as text: two digits, three from 100 on. What is below 1 is never rounded up to it."""
    if ratio is None:
        return NONE
    if ratio < 1:
        return f"{min(ratio, 0.99):.2f}"
    return f"{ratio:.1f}" if ratio < 9.95 else f"{ratio:.0f}"


def milliseconds(ms: float) -> str:
    """Return a time as text, three digits."""
    return f"{ms:.0f}" if ms >= 99.95 else f"{ms:.3g}" if ms >= 1 else f"{ms:.3f}"


def _style(row: Row) -> str:
    return "red" if loses(row) else ""


def _head(case: AnyCase) -> str:
    op = {"step": "fwd+bwd"}.get(case.op, case.op)
    return f"{op} {case.dtype} {case.shape_title} b{case.block} {case.threads}T"
