"""VR-PGE's claim in small: time of whole trainings on the digits to an accuracy: ``python -m bench.vrpge_claim``.

The MLP of ``sparsekern train`` on its bundled digits with AdamW, dense and with VR-PGE at 0.1 remaining, in turns,
epoch by epoch. Training alone is timed, not the evaluations. ``masked_pge`` of :mod:`bench.vrpge_step` is not trained:
its time is that of as many steps as VR-PGE took, at its measured milliseconds a step. One JSON line a seed, and the
medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import sparsekern as sk
from bench.cpu.results import Row, circumstances, rounded, write_rows
from bench.vrpge_step import NETWORKS, Network, contestants
from sparsekern.analysis.clock import race
from sparsekern.lab.data import load
from sparsekern.lab.models import mlp


class Training:
    """A training that goes on epoch by epoch.

    Args:
        network: what is trained.
        data: images and labels, of the training set and of the test set.
        seed: of the weights, and of the order of the images.
        steps: of the whole training; VR-PGE chooses its blocks after three quarters.
        remaining: of the sparse layers; None for the dense network.
        watch: the clock, in seconds.
    """

    def __init__(
        self,
        network: Network,
        data: Sequence[Tensor],
        seed: int,
        steps: int,
        remaining: float | None,
        watch: Callable[[], float],
    ) -> None:
        self.watch = watch
        self.images, self.labels, self.test_images, self.test_labels = data
        self.batch = network.shape[0]
        torch.manual_seed(seed)
        self.model: nn.Module = network.build()
        self.sparse: sk.VRPGE | None = None
        if remaining is None:
            self.optimizer = network.optimizer(self.model)
        else:
            stored = remaining * sk.VRPGE.pool
            sk.sparsify_(self.model, 1 - stored, network.block, ignore=list(network.kept_dense), seed=seed)
            self.optimizer = network.optimizer(self.model)
            self.sparse = sk.VRPGE(self.model, self.optimizer, sparsity=1 - remaining, stop=0.75 * steps, seed=seed)
        self.order = torch.Generator().manual_seed(seed)
        self.seconds, self.steps = 0.0, 0
        self.points: list[tuple[int, float, float]] = []

    def epoch(self) -> None:
        """Train for an epoch, timed, and note steps, seconds and the accuracy on the test set."""
        self.model.train()
        order = torch.randperm(self.images.shape[0], generator=self.order)
        began = self.watch()
        for some in order.split(self.batch):
            self._step(self.images[some], self.labels[some])
        self.seconds += self.watch() - began
        self.points.append((self.steps, self.seconds, self._accuracy()))

    def _step(self, x: Tensor, y: Tensor) -> None:
        def loss() -> Tensor:
            return cross_entropy(self.model(x), y)

        if self.sparse is None:
            loss().backward()
        else:
            self.sparse.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.sparse is not None:
            self.sparse.step()
        self.steps += 1

    @torch.no_grad()
    def _accuracy(self) -> float:
        self.model.eval()
        if self.sparse is None:
            found = self.model(self.test_images)
        else:
            with self.sparse.evaluation():
                found = self.model(self.test_images)
        return float((found.argmax(1) == self.test_labels).double().mean())

    def reached(self, accuracy: float) -> tuple[int, float] | None:
        """Return steps and seconds after which an accuracy was reached first."""
        return next(((steps, seconds) for steps, seconds, found in self.points if found >= accuracy), None)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/out/vrpge_claim.jsonl"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--remaining", type=float, default=0.1)
    parser.add_argument("--accuracy", type=float, default=0.95)
    parser.add_argument("--cpu-time", action="store_true", help="processor time, for one thread of a busy machine")
    options = parser.parse_args(argv)
    watch = time.process_time if options.cpu_time else time.perf_counter
    sk.keep_freed_memory()
    torch.set_flush_denormal(True)
    build: Callable[[], nn.Module] = lambda: mlp(10, 1, (8, 8), options.width)  # noqa: E731
    network = NETWORKS["mlp"]._replace(build=build)
    digits = load()
    data = digits.train_images, digits.train_labels, digits.test_images, digits.test_labels
    calls = {"masked_pge": contestants(network, options.remaining)["masked_pge"]}
    masked_ms = race(calls, torch.device("cpu"), 7, 10, watch)["masked_pge"].median
    steps = options.epochs * -(-data[0].shape[0] // network.shape[0])
    rows: list[Row] = []
    for seed in range(options.seeds):
        runs = {
            name: Training(network, data, seed, steps, remaining, watch)
            for name, remaining in (("dense", None), ("vrpge", options.remaining))
        }
        for _ in range(options.epochs):
            for run in runs.values():
                run.epoch()
        row: Row = {"seed": seed, "width": options.width, "threads": torch.get_num_threads(), "steps": steps}
        row |= {"cpu_time": options.cpu_time, "remaining": options.remaining, "accuracy": options.accuracy}
        for name, run in runs.items():
            at = run.reached(options.accuracy)
            row |= {f"{name}_last": rounded(run.points[-1][2]), f"{name}_all_s": rounded(run.seconds)}
            row |= {f"{name}_steps": at and at[0], f"{name}_s": at and rounded(at[1])}
        found = row["vrpge_steps"]
        row |= {"masked_pge_ms": rounded(masked_ms), "masked_pge_s": found and rounded(found * masked_ms / 1e3)}
        print(json.dumps(row), flush=True)
        rows.append(circumstances() | row)
    write_rows(options.out, rows)
    for name in ("vrpge", "dense", "masked_pge"):
        seconds = [row[f"{name}_s"] for row in rows]
        median = "not reached by all" if None in seconds else f"{statistics.median(seconds):.3g} s"
        print(f"{name}: {median} to {options.accuracy:.1%}")


if __name__ == "__main__":
    main()
