"""The short table that ends a run: what was measured, beside what was to be reached.

It reads the files of a folder, whichever of them are there:  python -m bench.gpu.table --out FOLDER
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bench.gpu.contestants import OURS
from bench.gpu.goals import CONV2D_MUST, DEVICE, DTYPE, FEATURES, GOALS, ORDER, TOKENS, break_even, verdict
from bench.gpu.part import parser
from bench.gpu.results import Row, read_json, read_rows
from bench.gpu.run_tests import outcomes

NONE = "-"


class Setting(NamedTuple):
    """What a line of the table is about; the block is the column."""

    op: str
    dtype: str
    tokens: int
    in_features: int
    out_features: int
    draw: str = "random"


HEADLINE = Setting("step", DTYPE, TOKENS, FEATURES, FEATURES)
REHEARSED = Setting("step", "fp16", 64, 64, 128)


class Race:
    """The package's rows of the comparison, by what they are about."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        self.found: dict[tuple[object, ...], Row] = {}
        for row in rows:
            if row.get("contestant") == OURS and "ms" in row:
                self.found[(*(row[field] for field in Setting._fields), row["block"], row["sparsity"])] = row

    def row(self, setting: Setting, block: int, sparsity: float) -> Row | None:
        """Return the package's row of a case."""
        return self.found.get((*setting, block, sparsity))

    def speedups(self, setting: Setting, block: int) -> dict[float, float]:
        """Return the speed-up over the best dense peer by sparsity."""
        found = {key[-1]: row["vs_dense"] for key, row in self.found.items() if key[:-1] == (*setting, block)}
        return {sparsity: ratio for sparsity, ratio in found.items() if ratio}  # type: ignore[misc]


def times(ratio: float | None) -> str:
    """Return a speed-up as text."""
    return NONE if ratio is None else f"{ratio:.2f}x"


def lines(folder: Path) -> Iterator[str]:
    """Yield the table."""
    files = {
        name: read_rows(folder / f"{name}.jsonl") for name in ("smoke", "tests", "micro", "tune", "conv2d", "race")
    }
    files["untuned"] = read_rows(folder / "untuned" / "untuned.jsonl")
    environment, counters, sanitizer = (
        read_json(folder / f"{n}.json") for n in ("environment", "counters", "sanitizer")
    )
    everything = [row for rows in files.values() for row in rows] + [environment or {}]
    rehearsal = any(row.get("rehearsal") for row in everything)
    if rehearsal:
        yield "*** REHEARSAL on the CPU, in Triton's interpreter, tiny sizes: THESE TIMES MEAN NOTHING ***"
    yield _environment(environment)
    yield f"{_smoke(files['smoke'])}; {_tests(files['tests'])}; {_sanitizer(sanitizer)}"
    yield from _micro(files["micro"])
    yield _counters(counters)
    device = (environment or {}).get("device", "")
    yield from _race(Race(files["untuned"]), rehearsal, device, "WITHOUT TUNING, ")
    yield _tune(files["tune"])
    yield from _race(Race(files["race"]), rehearsal, device)
    yield from _conv2d(files["conv2d"], rehearsal)
    yield from _failures(files)


def _environment(row: Row | None) -> str:
    if row is None:
        return "environment: not recorded"
    smi = row.get("nvidia-smi")
    driver = f", driver {smi.get('driver_version')}, {smi.get('clocks.max.sm')}" if isinstance(smi, dict) else ""
    counted = f", {row['multiprocessors']} SMs" if "multiprocessors" in row else ""
    return (
        f"{row['device']}{counted}{driver}; torch {row['torch']}, triton {row['triton']}, python {row['python']}; "
        f"commit {row['commit']}, {row['date'][:10]}"
    )


def _smoke(rows: list[Row]) -> str:
    calls = [row for row in rows if "case" in row]
    if not rows:
        return "smoke: not run"
    wrong = [row["key"] for row in rows if {"error", "refused"} & row.keys()]
    return f"smoke: {len(calls)} calls" + (f", WRONG: {'; '.join(wrong)}" if wrong else ", all right")


def _counters(row: Row | None) -> str:
    if row is None:
        return "counters: not read"
    sectors = row.get("sectors_a_request")
    return (
        f"counters: {sectors:.2f} L2 sectors a request at b16"
        if sectors
        else f"counters: {row.get('error', 'no sectors')}"
    )


def _tests(rows: list[Row]) -> str:
    last = outcomes(rows)
    if not last:
        return "tests: not run"
    counts = [f"{sum(r['outcome'] == kind for r in last.values())} {kind}" for kind in ("passed", "failed", "skipped")]
    return "tests: " + ", ".join(counts) + ("" if any(row.get("done") for row in rows) else " (NOT ALL OF THEM)")


def _sanitizer(row: Row | None) -> str:
    if row is None:
        return "sanitizer: not run"
    if row["failed"]:
        return f"sanitizer: FAILED, {row['errors']} errors, exit code {row['code']}"
    return f"sanitizer: {row['reason'] if row.get('reason') else str(row['errors']) + ' errors'}"


def _micro(rows: list[Row]) -> Iterator[str]:
    rates = {row["key"]: row.get("tb_s", row.get("tflops")) for row in rows if "tb_s" in row or "tflops" in row}

    def of(prefix: str) -> str:
        return ", ".join(f"{k.removeprefix(prefix).strip()} {v:.3g}" for k, v in rates.items() if k.startswith(prefix))

    if not rates:
        yield "micro: not measured"
        return
    held = ", ".join(f"{k[5:]} {v:.3g}" for k, v in rates.items() if k.startswith("dots N"))
    yield f"copy {rates.get('copy', float('nan')):.3g} TB/s; cuBLAS TFLOP/s: {of('cublas') or NONE}"
    yield f"L2 gather TB/s, by width of a block: {of('gather') or NONE}"
    yield f"dots TFLOP/s: {held or NONE}; fed from L2: {of('dots fed') or NONE}"


def _tune(rows: list[Row]) -> str:
    problems = [row for row in rows if "chosen" in row]
    if not problems:
        return "tuning: nothing tuned; the guesses of the roofline are used"
    first = " | 0"
    guesses = {r["key"].removesuffix(first): r["ms"] for r in rows if r.get("key", "").endswith(first) and "ms" in r}
    lost = [guesses[row["key"]] / row["ms"] for row in problems if row["key"] in guesses]
    median = f", the first guess takes {statistics.median(lost):.2f}x of the fastest (median)" if lost else ""
    convolutions = sum(row["key"].startswith("conv2d_") for row in problems)
    return f"tuning: {len(problems)} problems, {convolutions} of them of the convolution{median}"


def _race(race: Race, rehearsal: bool, device: str, tuned: str = "") -> Iterator[str]:
    if not race.found:
        yield f"{tuned}comparison: nothing measured"
        return
    head = REHEARSED if rehearsal else HEADLINE
    said = "times mean nothing, so there are no verdicts" if rehearsal else "verdicts are by the time on the device"
    yield f"{tuned}forward + backward, {_title(head)}, speed-up over cuBLAS ({said}):"
    for block in ORDER:
        for sparsity in sorted(race.speedups(head, block)) if rehearsal else GOALS[block].speedup:
            yield f"  b{block} at {sparsity:.0%}: " + _headline(race, head, block, sparsity, rehearsal)
    if DEVICE not in device and not rehearsal:
        yield f"  (the goals are those of an {DEVICE})"
    if tuned:
        return
    yield "others, by block " + ", ".join(map(str, ORDER)) + ": speed-up over cuBLAS (TFLOP/s on stored blocks)"
    for setting in sorted({Setting(*key[:6]) for key in race.found} - {head}):  # type: ignore[arg-type]
        measured = {float(str(key[-1])) for key in race.found if key[:6] == tuple(setting)}
        sparsity = 0.9 if 0.9 in measured else max(measured)
        found = [race.row(setting, block, sparsity) for block in ORDER]
        if any(found):
            cells = [NONE if row is None else f"{times(row['vs_dense'])} ({row['tflops']:.3g})" for row in found]
            yield f"  {_title(setting)}, {setting.op}, {sparsity:.0%}: " + ", ".join(cells)


def _conv2d(rows: list[Row], rehearsal: bool) -> Iterator[str]:
    found = [row for row in rows if row.get("contestant") == OURS and "ms" in row and row.get("vs_dense")]
    if not found:
        yield "convolution: nothing measured"
        return
    yield "convolution, 3x3, speed-up over cuDNN, channels last, on the device:"
    for row in found:
        judged = row["op"] == "step" and (row["block"], row["sparsity"], row["stride"]) == (64, 0.9, 1)
        reached = ""
        if judged and row["dtype"] == DTYPE and row["in_channels"] >= 256 and not rehearsal:
            reached = f" (must {CONV2D_MUST:g}: {'reached' if row['vs_dense'] >= CONV2D_MUST else 'MISSED'})"
        yield f"  {row['key'].split(' | ')[0].removeprefix('conv2d ')}: {times(row['vs_dense'])}{reached}"


def _headline(race: Race, head: Setting, block: int, sparsity: float, rehearsal: bool) -> str:
    row = race.row(head, block, sparsity)
    if row is None or not row["vs_dense"]:
        return "not measured"
    goal = GOALS[block]
    reached = ""
    if not rehearsal:
        must, aim = goal.speedup[sparsity]
        reached = f" (must {must:g}, aim {aim:g}: {verdict(row['vs_dense'], must, aim)})"
    words = [f"{times(row['vs_dense'])} on the device{reached}, {times(row['wall_vs_dense'])} with Python"]
    if row.get("graph_vs_dense"):
        words.append(f"{times(row['graph_vs_dense'])} by graph replay")
    even = break_even(race.speedups(head, block))
    if even is not None:
        bound = {"=": "", "<": "below ", ">": "above "}[even[1]]
        asked = "" if rehearsal else f" (goal {goal.break_even:.0%})"
        words.append(f"break-even {bound}{even[0]:.0%}{asked}")
    if row.get("vs_sparse"):
        words.append(f"{row['vs_sparse']:.1f}x of {row['best_sparse']}")
    return "; ".join(words)


def _title(setting: Setting) -> str:
    drawn = "" if setting.draw == "random" else f" {setting.draw}"
    return f"{setting.dtype} T={setting.tokens} K={setting.in_features} N={setting.out_features}{drawn}"


def _failures(files: dict[str, list[Row]]) -> Iterator[str]:
    for word in ("refused", "error"):
        bad = [(part, row) for part, rows in files.items() for row in rows if word in row and part != "tests"]
        if bad:
            part, row = bad[0]
            kind = "wrong answers, not timed" if word == "refused" else "that did not run"
            yield f"{len(bad)} {kind}, such as {part} {row['key']}: {row[word][:110]}"


def main() -> int:
    """Print the table."""
    print("\n".join(lines(parser(__doc__).parse_args().out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
