"""A training step of whole networks, dense against sparse, and where its time goes.

    python -m bench.end_to_end            ResNet-18 and the small VGG-16 of the recipes, 50, 75, 90 and 95 % sparse
    python -m bench.end_to_end --quick    90 % only, few steps

32 x 32 images, batches of 64, blocks of the recipe, everything channels last: forward, loss, backward and SGD. The
dense step and the sparse ones take turns. What the parts of a step take, PyTorch's profiler says in other steps.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile

from bench.cpu.results import circumstances, rounded, write_rows
from bench.cpu.table import milliseconds, times
from bench.gpu.results import ROOT, Row
from sparsekern import keep_freed_memory, sparsify_
from sparsekern.analysis.clock import race
from sparsekern.lab.recipes import find

NETWORKS = ("resnet18-cifar", "vgg16-small")
SPARSITIES = (0.5, 0.75, 0.9, 0.95)
IMAGES, SIDE, CLASSES = 64, 32, 10

PARTS = {
    "our kernels": ("sparsekern::",),
    "dense products": ("conv", "mkldnn", "mm", "linear"),
    "batch norm": ("batch_norm", "BatchNorm"),
    "relu": ("relu", "threshold", "clamp"),
    "pooling and mean": ("pool", "mean"),
    "copies and fills": ("copy_", "zero_", "fill_", "contiguous", "cat", "slice", "pad"),
    "optimizer": ("_foreach", "_fused"),
}
"""Names of operators, or parts of names, by what they are shown as; the first that fits counts."""

OTHER = "other"

Step = Callable[[], None]


def make_step(network: str, sparsity: float | None) -> Step:
    """Return a training step of a recipe's network; None is the dense one."""
    recipe = find(network)
    torch.manual_seed(0)
    model = recipe.model(num_classes=CLASSES, in_channels=3)
    if sparsity is not None:
        sparsify_(
            model, sparsity, recipe.block_size, ignore=recipe.kept_dense, distribution=recipe.distribution, seed=0
        )
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    images = torch.randn(IMAGES, 3, SIDE, SIDE).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (IMAGES,))

    def step() -> None:
        cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def parts_of(step: Step, repeats: int) -> dict[str, float]:
    """Return the milliseconds that each of :data:`PARTS` takes of a step by itself, and ``"other"``."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(repeats):
            step()
    found: Counter[str] = Counter()
    for event in seen.key_averages():
        found[part_of(event.key)] += event.self_cpu_time_total / 1e3 / repeats
    return dict(found)


def part_of(name: str) -> str:
    """Return under which of :data:`PARTS` an operator is shown."""
    return next((part for part, words in PARTS.items() if any(word in name for word in words)), OTHER)


def measure(network: str, sparsities: Sequence[float], threads: int, rounds: int) -> list[Row]:
    """Return the rows of a network: the dense one's, then those of the sparse ones."""
    torch.set_num_threads(threads)
    by_name = {"dense": None} | {f"{sparsity:g}": sparsity for sparsity in sparsities}
    steps = {name: make_step(network, sparsity) for name, sparsity in by_name.items()}
    timings = race(steps, torch.device("cpu"), rounds)
    dense = timings["dense"].median
    rows: list[Row] = []
    for name, timing in timings.items():
        parts = parts_of(steps[name], max(1, rounds // 3))
        total = sum(parts.values())
        rows.append(
            {
                "network": network,
                "block": find(network).block_size,
                "images": IMAGES,
                "threads": threads,
                "sparsity": by_name[name],
                "ms": rounded(timing.median),
                "fastest": rounded(min(timing.samples)),
                "samples": len(timing.samples),
                "vs_dense": rounded(dense / timing.median),
                "shares": {part: rounded(ms / total) for part, ms in sorted(parts.items(), key=lambda p: -p[1])},
            }
        )
    return rows


def table_of(rows: Sequence[Row]) -> Table:
    """Return a line for each network, sparsity and number of threads."""
    table = Table(title=f"a training step, {IMAGES} images of {SIDE} x {SIDE}", title_justify="left")
    for head in ("network", "threads", "sparsity", "ms", "x dense", *PARTS, OTHER):
        table.add_column(head, justify="left" if head == "network" else "right")
    for row in rows:
        sparsity = "dense" if row["sparsity"] is None else f"{row['sparsity']:.0%}"
        shares = (f"{row['shares'].get(part, 0.0):.0%}" for part in (*PARTS, OTHER))
        name = f"{row['network']} b{row['block']}"
        table.add_row(name, str(row["threads"]), sparsity, milliseconds(row["ms"]), times(row["vs_dense"]), *shares)
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the rows, print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.end_to_end", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="90 %% only, few steps, all cores")
    parser.add_argument("--network", choices=NETWORKS, action="append", help="one of the networks (default: all)")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "out" / "end_to_end.jsonl", help="results file")
    given = parser.parse_args(argv)
    cores = min(2, os.cpu_count() or 1)
    before = torch.get_num_threads()
    rows: list[Row] = []
    try:
        for network in given.network or NETWORKS:
            for threads in (cores,) if given.quick else range(1, cores + 1):
                rows += measure(network, (0.9,) if given.quick else SPARSITIES, threads, 4 if given.quick else 9)
    finally:
        torch.set_num_threads(before)
    common = circumstances()
    write_rows(given.out, [{**row, **common} for row in rows])
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(table_of(rows))
    where = f"{common['device']}, {common['path']}; torch {common['torch']}"
    console.print(f"{where}; written: {given.out}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
