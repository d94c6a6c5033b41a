"""GSE's claim of linear time: steps and updates of one layer against its width: ``python -m bench.width``.

The layer is ``width x width`` and stores a constant multiple of ``in + out`` elements, so a dense layer grows by four
where it grows by two. ``step`` is forward, backward and SGD with momentum on a fixed number of tokens. ``update`` is
all that an update adds to the two steps of its cycle: drawing candidates, the probe in the backward, choosing, moving.
RigL's update and the dense step are beside it, up to the width at which they would take too long.

Operations and bytes are linear at any number of tokens. Of 64 tokens the activations of 16384 features are 4 MiB and
leave an L2 cache, of 16 they do not: so both are measured.

One JSON line a time; lines with ``exponent`` are slopes of log time against log width, by least squares. A picture is
written beside the file.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sparsekern as sk
from bench.cpu.results import Row, circumstances, rounded, write_rows
from sparsekern.analysis.clock import race

WIDTHS = (512, 1024, 2048, 4096, 8192, 16384)
BLOCKS = (1, 16)
PER_FEATURE = 32
"""Stored elements over ``in + out``."""

TOKENS = (64, 16)
"""RigL and the dense layer take part at the first number only."""

LONG = 1500.0
"""Milliseconds that a contestant may take; it is left out from where four times its last time is more."""

CASE = ("block", "tokens", "what")

GROWTH = 1.1
"""The highest exponent that counts as linear."""


def training(layer: nn.Module, tokens: int, method: Callable[..., sk.Method] | None) -> Callable[[], None]:
    """Return a training step of a layer."""
    generator = torch.Generator().manual_seed(0)
    features = layer.in_features
    assert isinstance(features, int)
    x = torch.randn(tokens, features, generator=generator).requires_grad_()
    dy = torch.randn(tokens, features, generator=generator)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-4, momentum=0.9)
    sparse = None if method is None else method(layer, optimizer)

    def step() -> None:
        layer(x).backward(dy)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        x.grad = None
        if sparse is not None:
            sparse.step()

    return step


def contestants(width: int, block: int, tokens: int) -> dict[str, Callable[[], Callable[[], object]]]:
    """Return what makes each contestant; a ``cycle`` is two steps, of which the second ends in an update."""

    def sparse(kind: type[sk.Method], every: int, **options: Any) -> Callable[[], None]:
        sparsity = 1 - PER_FEATURE * 2 / width
        layer = sk.SparseLinear(width, width, bias=False, sparsity=sparsity, block_size=block, seed=0)
        return training(layer, tokens, lambda m, o: kind(m, o, update_every=every, **options))

    def twice(step: Callable[[], None]) -> Callable[[], None]:
        return lambda: (step(), step())[0]

    return {
        "step": lambda: sparse(sk.GSE, 10**9),
        "gse cycle": lambda: twice(sparse(sk.GSE, 2)),
        "rigl cycle": lambda: twice(sparse(sk.RigL, 2, allow_dense_scores=block == 1)),
        "dense step": lambda: training(nn.Linear(width, width, bias=False), tokens, None),
    }


def measure(widths: Sequence[int], blocks: Sequence[int], tokens: int, rounds: int, *, peers: bool) -> list[Row]:
    """Return a row for every time that was measured, those of RigL and of the dense layer if ``peers``."""
    about = {**circumstances(), "threads": torch.get_num_threads(), "tokens": tokens, "per_feature": PER_FEATURE}
    rows: list[Row] = []
    for block in blocks:
        last: dict[str, float] = {}
        for width in widths:
            taking_part = {
                name: make()
                for name, make in contestants(width, block, tokens).items()
                if name in ("step", "gse cycle") or (peers and 4 * last.get(name, 0.0) < LONG)
            }
            timings = race(taking_part, torch.device("cpu"), rounds, seconds=2)
            last |= {name: timing.median for name, timing in timings.items()}
            times = {name: last[name] for name in taking_part}
            found = {"step": times["step"], "gse update": times["gse cycle"] - 2 * times["step"]}
            if "rigl cycle" in times:
                found["rigl update"] = times["rigl cycle"] - 2 * times["step"]
            if "dense step" in times:
                found["dense step"] = times["dense step"]
            for what, ms in found.items():
                rows.append({**about, "block": block, "width": width, "what": what, "ms": rounded(ms)})
    return rows


def exponents(rows: Sequence[Row]) -> list[Row]:
    """Return the slope of each quantity of each block size; None where fewer than two times are above zero."""
    found = []
    for case in dict.fromkeys(map(case_of, rows)):
        mine = [row for row in rows if case_of(row) == case and row["ms"] > 0]
        slope = None
        if len(mine) > 1:
            logs = [[math.log(row[key]) for row in mine] for key in ("width", "ms")]
            slope = rounded(statistics.linear_regression(*logs).slope)
        widths = [row["width"] for row in mine]
        found.append({**dict(zip(CASE, case, strict=True)), "exponent": slope, "widths": widths})
    return found


def case_of(row: Row) -> tuple[Any, ...]:
    """Return what all times of one line of the picture have in common."""
    return tuple(row[key] for key in CASE)


MARKERS = {"step": "o", "gse update": "s", "rigl update": "^", "dense step": "D"}


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Write the picture: a panel a block size, both axes logarithmic."""
    from matplotlib.figure import Figure

    slopes = {case_of(row): row["exponent"] for row in rows if "exponent" in row}
    times = [row for row in rows if "ms" in row]
    blocks = sorted({row["block"] for row in times})
    figure = Figure(figsize=(6 * len(blocks), 6.5), dpi=90, layout="constrained")
    for axes, block in zip(figure.subplots(1, len(blocks), sharey=True, squeeze=False)[0], blocks, strict=True):
        for case in dict.fromkeys(case_of(row) for row in times if row["block"] == block):
            mine = [row for row in times if case_of(row) == case and row["ms"] > 0]
            _, tokens, what = case
            slope = "" if slopes.get(case) is None else f": width^{slopes[case]:.2f}"
            style = {"marker": MARKERS[what], "linestyle": "-" if tokens == times[0]["tokens"] else ":"}
            label = f"{what}, {tokens} tokens{slope}"
            axes.plot([row["width"] for row in mine], [row["ms"] for row in mine], label=label, **style)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(f"blocks of {block} x {block}")
        axes.set_xlabel(f"width; {times[0]['per_feature']} (in + out) elements")
        axes.grid(alpha=0.3)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
    figure.supylabel("milliseconds")
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the exponents, write the file and the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/out/width.jsonl"))
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--blocks", type=int, nargs="+", default=BLOCKS)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--draw", action="store_true", help="draw the picture of a file, measure nothing")
    options = parser.parse_args(argv)
    if options.draw:
        draw(options.out.with_suffix(".png"), [json.loads(line) for line in options.out.read_text().splitlines()])
        return
    rows: list[Row] = []
    for tokens in options.tokens:
        peers = tokens == options.tokens[0]
        rows += measure(options.widths, options.blocks, tokens, options.rounds, peers=peers)
    slopes = exponents(rows)
    write_rows(options.out, [*rows, *slopes])
    draw(options.out.with_suffix(".png"), [*rows, *slopes])
    for row in slopes:
        linear = row["what"] in ("step", "gse update")
        verdict = (
            "" if not linear or row["exponent"] is None else "  linear" if row["exponent"] <= GROWTH else "  NOT LINEAR"
        )
        print(f"block {row['block']:>3}  {row['tokens']:>3} tokens  {row['what']:<12} width^{row['exponent']}{verdict}")


if __name__ == "__main__":
    main()
