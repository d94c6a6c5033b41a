"""Sparse-IFT's claim in small: ``python -m bench.sparse_ift_claim run --data fashion_mnist.npz`` for JSON lines.

A dense MLP against Sparse Wide at 50, 75 and 90 % with blocks that stay (Static), SET and RigL: the same FLOPs a step,
batches, rates and epochs. One line a run: test accuracy after each epoch, milliseconds of CPU time a step (all threads
together: give it one), and the block graphs at each move of blocks. ``show FILE`` prints the table, ``draw FILE
PICTURE`` draws it.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import sparsekern as sk
from sparsekern.analysis import profile, spectral, stored_parameters
from sparsekern.lab.data import Dataset, load
from sparsekern.lab.models import mlp
from sparsekern.topology import generator_for
from sparsekern.training import METHODS
from sparsekern.transforms import Width, transform

SPARSITIES, MOVES = (0.5, 0.75, 0.9), ("static", "set", "rigl")
WIDTH, BLOCK, BATCH, RATE, EVERY = 128, 16, 256, 1e-3, 25


def build(data: Dataset, sparsity: float, seed: int) -> nn.Module:
    """Return the network: its first layer is sparse too, for it has most weights; the last stays dense."""

    def dense(width: Width) -> nn.Module:
        channels, height, across = data.image_shape
        return mlp(data.classes, channels, (height, across), width(WIDTH))

    return transform(dense, "wide", sparsity, data.train_images[:1], block_size=BLOCK, ignore=["output"], seed=seed)


def train(data: Dataset, sparsity: float, move: str, seed: int, epochs: int) -> dict[str, Any]:
    """Train one network with AdamW and a cosine; blocks move until three quarters of the training."""
    model = build(data, sparsity, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    count = data.train_images.shape[0]
    steps = epochs * math.ceil(count / BATCH)
    method = None
    if sparsity > 0:
        method = METHODS[move](model, optimizer, update_every=EVERY, stop=0.75 * steps, seed=seed)
    accuracy, graphs, step, spent = [], [], 0, 0.0
    for epoch in range(epochs):
        began = time.process_time()
        for chosen in torch.randperm(count, generator=generator_for(seed, "order", epoch)).split(BATCH):
            for group in optimizer.param_groups:
                group["lr"] = RATE * (1 + math.cos(math.pi * step / steps)) / 2
            cross_entropy(model(data.train_images[chosen]), data.train_labels[chosen]).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if method is not None and method.step() and seed == 0:
                graphs.append({"step": step} | graph_means(model))
        spent += time.process_time() - began
        with torch.no_grad():
            right = model(data.test_images).argmax(1) == data.test_labels
        accuracy.append(round(100 * float(right.double().mean()), 3))
    return {
        "network": "dense" if sparsity == 0 else "wide",
        "sparsity": sparsity,
        "method": move if sparsity else None,
        "seed": seed,
        "accuracy": accuracy,
        "multiply_adds": profile(model, data.train_images[:1]).multiply_adds,
        "parameters": stored_parameters(model),
        "widths": [layer.grid.out_features for layer in sk.sparse_layers(model).values()],
        "absent": [round(layer.sparsity, 4) for layer in sk.sparse_layers(model).values()],
        "cpu_ms_per_step": round(1e3 * spent / steps, 3),
        "graphs": graphs,
        "about": {
            "width": WIDTH,
            "block": BLOCK,
            "batch": BATCH,
            "epochs": epochs,
            "images": count,
            "update_every": EVERY,
        },
    }


def graph_means(model: nn.Module) -> dict[str, float]:
    """Return the mean over layers of each measure that is defined."""
    found = [vars(spectral(layer)) for layer in sk.sparse_layers(model).values()]
    known = {key: [one[key] for one in found if one[key] is not None] for key in found[0]}
    return {key: statistics.fmean(values) for key, values in known.items() if values}


def runs(data: Dataset, seeds: Sequence[int], epochs: int) -> Iterator[dict[str, Any]]:
    """Train all, seed by seed, so that an interrupted experiment has whole seeds."""
    for seed in seeds:
        yield train(data, 0.0, "static", seed, epochs)
        for sparsity in SPARSITIES:
            for move in MOVES:
                yield train(data, sparsity, move, seed, epochs)


def groups(lines: Sequence[dict[str, Any]]) -> dict[tuple[float, str | None], list[dict[str, Any]]]:
    """Return the runs of each sparsity and method, in the order in which they came."""
    found: dict[tuple[float, str | None], list[dict[str, Any]]] = {}
    for line in lines:
        found.setdefault((line["sparsity"], line["method"]), []).append(line)
    return found


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Return the final accuracies as Markdown: mean and range over seeds, and the mean of differences seed by seed."""
    dense = {line["seed"]: line["accuracy"][-1] for line in lines if line["sparsity"] == 0}
    text = [
        "| sparsity | blocks | test accuracy | range | against dense | parameters | multiply-adds | CPU ms a step |"
    ]
    text.append("| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for (sparsity, method), group in groups(lines).items():
        last = [line["accuracy"][-1] for line in group]
        differences = [line["accuracy"][-1] - dense[line["seed"]] for line in group]
        against = ""
        if sparsity and len(group) > 1:
            against = f"{statistics.fmean(differences):+.2f} ± {statistics.stdev(differences) / len(group) ** 0.5:.2f}"
        one, ms = group[0], statistics.median(line["cpu_ms_per_step"] for line in group)
        cells = [f"{sparsity:.0%}" if sparsity else "dense", method or "", f"{statistics.fmean(last):.2f} %"]
        cells += [f"{min(last):.2f} to {max(last):.2f}", against, f"{one['parameters']:,}", f"{one['multiply_adds']:,}"]
        text.append("| " + " | ".join([*cells, f"{ms:.2f}"]) + " |")
    return "\n".join(text)


def draw(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw final accuracy by sparsity, accuracy by epoch at the highest sparsity, and the graphs of seed 0 there."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.4), dpi=110, layout="constrained")
    final, curve, gap = figure.subplots(1, 3)
    by = groups(lines)
    dense = [line["accuracy"] for line in by[0.0, None]]
    colours = dict(zip(MOVES, ("#0b6e99", "#c4570c", "#5b8c2a"), strict=True))
    last = [run[-1] for run in dense]
    final.axhspan(min(last), max(last), color="#888888", alpha=0.2, linewidth=0)
    final.axhline(statistics.fmean(last), color="#444444", label="dense")
    sparsities = sorted({sparsity for sparsity, _ in by if sparsity})
    for move in MOVES:
        ends = [[line["accuracy"][-1] for line in by[s, move]] for s in sparsities]
        means = [statistics.fmean(end) for end in ends]
        errors = [
            [m - min(e) for m, e in zip(means, ends, strict=True)],
            [max(e) - m for m, e in zip(means, ends, strict=True)],
        ]
        final.errorbar(
            [100 * s for s in sparsities], means, errors, color=colours[move], marker="o", capsize=3, label=move
        )
        runs_ = [line["accuracy"] for line in by[sparsities[-1], move]]
        curve.plot(
            range(1, len(runs_[0]) + 1),
            [statistics.fmean(e) for e in zip(*runs_, strict=True)],
            color=colours[move],
            label=move,
        )
        graphs = by[sparsities[-1], move][0]["graphs"]
        if graphs:
            gap.plot([g["step"] for g in graphs], [g["ramanujan_gap"] for g in graphs], color=colours[move], label=move)
    curve.plot(
        range(1, len(dense[0]) + 1),
        [statistics.fmean(e) for e in zip(*dense, strict=True)],
        color="#444444",
        label="dense",
    )
    final.set(
        title="Sparse Wide at the dense FLOPs, mean and range of seeds",
        xlabel="sparsity asked (%)",
        ylabel="test accuracy (%)",
    )
    curve.set(title=f"at {sparsities[-1]:.0%}, mean of seeds", xlabel="epoch", ylabel="test accuracy (%)")
    gap.set(
        title=f"Ramanujan gap of the block graphs at {sparsities[-1]:.0%}",
        xlabel="step",
        ylabel="mean of layers, seed 0",
    )
    for axes in (final, curve, gap):
        axes.grid(alpha=0.25)
        if axes.lines:
            axes.legend(frameon=False)
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> None:
    """Run, show or draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("--data", default=None, help="what `sparsekern train --data` takes; default: the digits")
    run.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    run.add_argument("--epochs", type=int, default=10)
    run.add_argument("--images", type=int, default=20_000, help="of the training set, the first ones")
    for name in ("show", "draw"):
        command = commands.add_parser(name)
        command.add_argument("file", type=Path)
    command.add_argument("picture", type=Path)
    options = parser.parse_args(argv)
    if options.command == "run":
        data = load(options.data)
        first = replace(
            data, train_images=data.train_images[: options.images], train_labels=data.train_labels[: options.images]
        )
        for row in runs(first, options.seeds, options.epochs):
            print(json.dumps(row), flush=True)
        return
    lines = [json.loads(line) for line in options.file.read_text().splitlines()]
    if options.command == "show":
        print(table(lines))
    else:
        draw(lines, options.picture)


if __name__ == "__main__":
    main()
