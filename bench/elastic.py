"""A run that three ranks begin and two finish, beside one that a single process trains: ``python -m bench.elastic``.

A small GPT with GSE on the source of the standard library, under ``fully_shard``; the three ranks are stopped in the
middle of an epoch. One JSON line an epoch: the loss and the bits per byte of both runs, how many ranks ended it, and in
the last line the fraction of blocks that both runs have in the same slots.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

from sparsekern.lab import Config, Interrupted, Observer, resume, start
from sparsekern.lab.distributed import Ranks

BEGIN, FINISH = 3, 2
"""Numbers of ranks."""


class Stop(Observer):
    """Asks to stop before a step, counted from 0."""

    def __init__(self, step: int) -> None:
        self.left = step

    def should_stop(self) -> bool:
        """Return whether it is this step's turn."""
        self.left -= 1
        return self.left < 0


def run_rank(rank: int, count: int, config: Config, folder: str, stop: int) -> None:
    """Begin the run, or go on with it, on one rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{count}", rank=rank, world_size=count)
    ranks, run = Ranks(rank, count, rank, "fsdp2"), Path(folder) / "several"
    if count == BEGIN:
        with suppress(Interrupted):
            start(config, run, Stop(stop), ranks=ranks)
    else:
        resume(run, Observer(), ranks)
    dist.destroy_process_group()


def rows_of(run: Path) -> list[dict[str, Any]]:
    """Return the rows of a run, one an epoch."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def same_blocks(one: Path, other: Path) -> float:
    """Return the fraction of blocks that two runs have in the same slots at their ends."""
    newest = [max((run / "checkpoints" / "seed-0").glob("step-*")) / "sparse.safetensors" for run in (one, other)]
    states = [load_file(path) for path in newest]
    same = total = 0
    for name, rows in states[0].items():
        if name.endswith(".row"):
            cols = name.removesuffix("row") + "col"
            alike = (rows == states[1][name]) & (states[0][cols] == states[1][cols])
            same, total = same + int(alike.sum()), total + alike.numel()
    return same / total


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Train both runs, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--data", help="a text in place of the standard library's source")
    parser.add_argument("--out", type=Path, help="a file that gets the lines, too")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    config = Config(
        recipe="gpt-nano", data=options.data, width=options.width, block_size=16, epochs=options.epochs, batch_size=48,
        seeds=1, method="gse", update_every=20, dense=False, device="cpu",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        one, several = Path(folder) / "one", Path(folder) / "several"
        start(config, one, Observer())
        steps = rows_of(one)[-1]["step"]
        for count in (BEGIN, FINISH):
            mp.spawn(run_rank, (count, config, folder, steps // 2 + 5), nprocs=count)
        rows = [
            {
                "epoch": mine["epoch"], "ranks": BEGIN if mine["step"] <= steps // 2 + 5 else FINISH,
                "loss": round(mine["loss"], 6), "loss_of_one": round(alone["loss"], 6),
                "bits_per_byte": round(mine["bits_per_byte"], 6),
                "bits_per_byte_of_one": round(alone["bits_per_byte"], 6),
            }
            for mine, alone in zip(rows_of(several), rows_of(one), strict=True)
        ]  # fmt: skip
        rows[-1]["same_blocks"] = same_blocks(one, several)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    print(lines, end="", flush=True)
    if options.out:
        options.out.write_text(lines)
    return rows


if __name__ == "__main__":
    main()
