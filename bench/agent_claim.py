"""AGENT's claim in small, with its controls: ``python -m bench.agent_claim DATA.npz``.

A small MLP, all layers but the last sparse in blocks of 1x1 as in the paper, SET as host, SGD with momentum whose rate
falls to a tenth at half and at three quarters of the training. Accuracy on the test set four times an epoch, with the
FLOPs and the processor seconds of one thread that the training took so far: what AGENT adds is in both. A training that
is in the file already is not repeated. ``--show`` prints the tables of a file, ``--plot`` draws it. On a machine that
others use as well, ``--untimed`` leaves the seconds out.

Contestants: ``sgd``, the host alone; ``agent``, as the paper, with a pass over all batches an epoch; ``agent 5 %``,
over a twentieth of them; ``agent gradients`` and ``agent gradients 5 %``, the same two with c from gradients and
gamma 1; and the controls ``batch x2``, ``rate / 10`` and ``epochs x3.3``, the host with the FLOPs of AGENT.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

import sparsekern as sk
from bench.agent_claim_table import draw, tables
from sparsekern.lab.data import Dataset, load
from sparsekern.topology import generator_for

LOOKS = 4
"""Evaluations an epoch."""


class Contestant(NamedTuple):
    """One way to train: AGENT's options if it takes part, and how batch, rate and epochs differ from the host's."""

    agent: dict[str, Any] | None = None
    batch: int = 1
    rate: float = 1.0
    epochs: float = 1.0


CONTESTANTS = {
    "sgd": Contestant(),
    "agent": Contestant({}),
    "agent 5 %": Contestant({"batches": 0.05}),
    "agent gradients": Contestant({"estimate": "gradients", "gamma": 1.0}),
    "agent gradients 5 %": Contestant({"estimate": "gradients", "gamma": 1.0, "batches": 0.05}),
    "batch x2": Contestant(batch=2),
    "rate / 10": Contestant(rate=0.1),
    "epochs x3.3": Contestant(epochs=3.3),
}


class Training:
    """One training of one contestant.

    Args:
        data: the set.
        name: of the contestant.
        sparsity: of the layers but the last.
        seed: of all that is random.
        options: of the command line: width, images, batch, rate, epochs.
    """

    def __init__(self, data: Dataset, name: str, sparsity: float, seed: int, options: argparse.Namespace) -> None:
        chosen = CONTESTANTS[name]
        self.data, self.name, self.sparsity, self.seed = data, name, sparsity, seed
        self.batch, self.rate = options.batch * chosen.batch, options.rate * chosen.rate
        self.per_epoch = math.ceil(min(options.images, len(data.train_labels)) / self.batch)
        self.images = min(options.images, len(data.train_labels))
        self.total = round(options.epochs * chosen.epochs * self.per_epoch)
        torch.manual_seed(seed)
        inputs = math.prod(data.image_shape)
        self.model = nn.Sequential(
            nn.Linear(inputs, options.width),
            nn.ReLU(),
            nn.Linear(options.width, options.width),
            nn.ReLU(),
            nn.Linear(options.width, data.classes),
        )
        sk.sparsify_(self.model, sparsity, 1, ignore=["4"], distribution="erk", seed=seed)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=self.rate, momentum=0.9, weight_decay=5e-4)
        method: sk.Method = sk.SET(
            self.model, self.optimizer, update_every=max(1, self.per_epoch // 2), stop=0.75 * self.total, seed=seed
        )
        self.method: sk.Method | sk.AGENT = method
        if chosen.agent is not None:
            arguments = dict(chosen.agent)
            if "batches" in arguments:
                arguments["batches"] = max(2, round(arguments["batches"] * self.per_epoch))
            self.method = sk.AGENT(self.model, self.optimizer, method=method, **arguments)
        self.plain_flops = 0

    def batches(self, purpose: str, epoch: int) -> list[tuple[Tensor, Tensor]]:
        """Return the batches of an epoch."""
        order = torch.randperm(self.images, generator=generator_for(self.seed, purpose, epoch))
        images = self.data.train_images.flatten(1)
        return [(images[part], self.data.train_labels[part]) for part in order.split(self.batch)]

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the loss of a batch."""
        return cross_entropy(self.model(batch[0]), batch[1])

    def run(self) -> list[dict[str, float]]:
        """Train; returns a point each time that the network was looked at."""
        points, seconds, step, epoch = [], 0.0, 0, 0
        looks = max(1, self.per_epoch // LOOKS)
        flops = self._step_flops()
        while step < self.total:
            batches = self.batches("order", epoch)
            began = time.process_time()
            if isinstance(self.method, sk.AGENT):
                self.method.refresh(self.batches("pass", epoch), self.loss)
            for batch in batches[: self.total - step]:
                for group in self.optimizer.param_groups:
                    group["lr"] = self.rate * 0.1 ** ((step >= self.total // 2) + (step >= 3 * self.total // 4))
                self.method.backward(lambda batch=batch: self.loss(batch))
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                self.method.step()
                step += 1
                if step % looks == 0 or step == self.total:
                    seconds += time.process_time() - began
                    points.append(self._look(step, flops, seconds))
                    began = time.process_time()
            seconds += time.process_time() - began
            epoch += 1
        return points

    def _look(self, step: int, flops: int, seconds: float) -> dict[str, float]:
        with torch.no_grad():
            right = (self.model(self.data.test_images.flatten(1)).argmax(1) == self.data.test_labels).double().mean()
        point = {"epoch": step / self.per_epoch, "accuracy": float(right), "seconds": seconds, "flops": flops * step}
        if isinstance(self.method, sk.AGENT):
            metrics = self.method.metrics()
            point["flops"] += metrics["extra_flops"]
            point |= {key: metrics[key] for key in ("c", "variance_ratio", "corrected")}
        return point

    def _step_flops(self) -> int:
        with FlopCounterMode(display=False) as counter:
            self.loss(self.batches("order", 0)[0]).backward()
        self.optimizer.zero_grad(set_to_none=True)
        return int(counter.get_total_flops())


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a results file; none if there is no such file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _rounded(point: dict[str, float]) -> dict[str, float]:
    return {key: float(f"{value:.5g}") for key, value in point.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", help="an .npz file, such as Fashion-MNIST's")
    parser.add_argument("--out", type=Path, default=Path("bench/out/agent_claim.jsonl"))
    parser.add_argument("--show", action="store_true", help="train nothing")
    parser.add_argument("--untimed", action="store_true", help="leave out the seconds: the machine is not ours alone")
    parser.add_argument("--plot", type=Path, help="draw the curves into this file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9, 0.99])
    parser.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    for name, default in (("width", 256), ("images", 30_000), ("batch", 100), ("epochs", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rate", type=float, default=0.1)
    options = parser.parse_args(argv)
    rows = read(options.out)
    if not options.show:
        data = load(options.data)
        done = {(row["contestant"], row["sparsity"], row["seed"]) for row in rows}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        for seed in options.seeds:
            for sparsity in options.sparsity:
                for name in options.contestants:
                    if (name, sparsity, seed) in done:
                        continue
                    points = [_rounded(point) for point in Training(data, name, sparsity, seed, options).run()]
                    if options.untimed:
                        points = [{key: value for key, value in p.items() if key != "seconds"} for p in points]
                    settings = {key: getattr(options, key) for key in ("width", "images", "batch", "rate", "epochs")}
                    row = {"contestant": name, "sparsity": sparsity, "seed": seed, "data": data.name, **settings}
                    row |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "points": points}
                    with options.out.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    rows.append(row)
    print(tables(rows))
    if options.plot is not None:
        draw(rows, options.plot)


if __name__ == "__main__":
    main()
