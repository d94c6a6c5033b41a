"""Bytes that each rank sends in a step, and its peak of memory: ``python -m bench.traffic --out FILE``.

Processes that talk by gloo train the linear layers of the recipe gpt's blocks, densely and at 90 % sparsity, under
DistributedDataParallel and under ``fully_shard``. A dispatch mode sees every collective, and counts what a rank sends
where a ring carries it out: an all-reduce of n bytes ``2 n (p - 1) / p``, an all-gather to n bytes and a reduce-scatter
from n bytes ``n (p - 1) / p``, a broadcast n. One JSON line for each model and strategy.

With ``--whole`` it is the whole network, with its embeddings, norms and attention, on sequences of 128 tokens.

A method with a number, as ``gse:2``, has it for ``score_sketches``.

``gradients``, ``gathers`` and ``buffers`` are bytes of a step, ``of_dense`` their sum over that of the dense model.
``scores``, ``moves`` and ``agreement`` are what an update adds to the steps up to it, ``bytes_a_slot`` their sum over
the number of slots.
``peak_mib`` is the growth of a rank's resident memory from before the model was built to its peak in three steps, the
last of which has an update; what was allocated only until the model was sharded does not count.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sparsekern as sk
from sparsekern.lab.models import GPT
from sparsekern.lab.models.gpt import HEAD_FEATURES
from sparsekern.nn import BlockSparse
from sparsekern.training import METHODS

CONTEXT = 128

EVERY = 3
"""Steps from update to update: room for the two in which RigL has probes."""


class Traffic(TorchDispatchMode):
    """Counts the bytes that this rank sends, by kind of collective, while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            self._count(func._schema.name.split("::")[1].strip("_"), args, result)
        return result

    def _count(self, name: str, args: Any, result: Any) -> None:
        ranks, share = dist.get_world_size(), (dist.get_world_size() - 1) / dist.get_world_size()
        if "allgather" in name or "all_gather" in name:  # the largest tensor is what all have together
            self.sent["gather"] += int(share * max(map(_bytes, tree_leaves((args, result)))))
        elif "reduce_scatter" in name:
            self.sent["scatter"] += int(share * max(map(_bytes, tree_leaves((args, result)))))
        elif "allreduce" in name or "all_reduce" in name:
            size = sum(map(_bytes, tree_leaves(args[0])))
            self.sent["small reduce" if size <= 8 * ranks else "reduce"] += int(2 * share * size)
        elif "broadcast" in name:
            self.sent["broadcast"] += sum(map(_bytes, tree_leaves(args[0])))


def _bytes(leaf: Any) -> int:
    return leaf.numel() * leaf.element_size() if isinstance(leaf, Tensor) else 0


def peak() -> int:
    """Return the peak of this process's resident memory since :func:`restart_peak`, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def restart_peak() -> None:
    """Set the peak to the present resident memory."""
    Path("/proc/self/clear_refs").write_text("5")


def network(width: int, depth: int) -> nn.Sequential:
    """Return the linear layers of a GPT's blocks, applied one after another."""
    shapes = [(width, 3 * width), (3 * width, width), (width, 4 * width), (4 * width, width)]
    parts = [nn.Sequential(*(nn.Linear(n, m, bias=False) for n, m in shapes)) for _ in range(depth)]
    return nn.Sequential(*parts)


def scene(options: argparse.Namespace, sparsity: float) -> tuple[nn.Module, list[nn.Module], Tensor]:
    """Return a model, its parts that are sharded one by one, and an input, which is another one on each rank."""
    torch.manual_seed(0)
    if options.whole:
        heads = options.width // HEAD_FEATURES
        model: nn.Module = GPT(256, CONTEXT, depth=options.depth, heads=heads, head_features=HEAD_FEATURES)
        parts = list(model.layers)
    else:
        model = network(options.width, options.depth)
        parts = list(model)
    torch.manual_seed(1 + dist.get_rank())
    if options.whole:
        x = torch.randint(256, (-(-options.tokens // CONTEXT), CONTEXT))
    else:
        x = torch.randn(options.tokens, options.width)
    return sk.sparsify_(model, sparsity, options.block) if sparsity else model, parts, x


def run_rank(rank: int, options: argparse.Namespace, name: str | None, strategy: str, folder: str) -> None:
    """Measure on one rank; the first one writes the row."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=options.ranks)
    row = measure(options, name, strategy)
    if rank == 0:
        (Path(folder) / "row.json").write_text(json.dumps(row))
    gc.collect()  # DistributedDataParallel must not outlive the group: its end would wait for ever
    dist.destroy_process_group()


def measure(options: argparse.Namespace, name: str | None, strategy: str) -> dict[str, Any]:
    """Train, and return the row of this rank."""
    restart_peak()
    before = peak()
    sparsity = options.sparsity if name else 0.0
    model, parts, x = scene(options, sparsity)
    if strategy == "ddp":
        model = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (options.ranks,))
        for part in parts:
            fully_shard(part, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    kind, _, sketches = (name or "").partition(":")
    scoring = {"score_sketches": int(sketches)} if sketches else {}
    method = METHODS[kind](model, optimizer, update_every=EVERY, **scoring) if kind else None
    restart_peak()
    sent = []
    for _ in range(EVERY):
        with Traffic() as traffic:
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step = Counter(traffic.sent)
            if method is not None:
                method.step()
        sent.append((step, traffic.sent - step))
    step, update = sent[-1][0], sum((extra for _, extra in sent), Counter())
    slots = sum(m.values.shape[0] for m in model.modules() if isinstance(m, BlockSparse))
    return {
        "network": "gpt" if options.whole else "linear layers", "strategy": strategy, "ranks": options.ranks,
        "sparsity": sparsity, "block": options.block,
        "method": name, "width": options.width, "depth": options.depth,
        "gradients": step["reduce"] + step["scatter"], "gathers": step["gather"],
        "buffers": step["broadcast"], "slots": slots,
        "scores": update["gather"] + update["scatter"] + update["reduce"], "moves": update["broadcast"],
        "agreement": update["small reduce"],
        "bytes_a_slot": round(sum(update.values()) / slots, 3) if slots else None,
        "peak_mib": round((peak() - before) / 2**20, 1), "torch": torch.__version__,
    }  # fmt: skip


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("ranks", 2), ("width", 384), ("depth", 6), ("block", 32), ("tokens", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--whole", action="store_true", help="the whole network, in place of its linear layers")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--methods", nargs="*", default=["set", "rigl", "rigl:2", "gse", "gse:2"])
    parser.add_argument("--out", type=Path, help="a file that gets the lines, too")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure the dense model and the sparse one with each method, under both strategies, and print."""
    options, rows, dense = parse(argv), [], 0
    for strategy in ("ddp", "fsdp2"):
        for name in (None, *options.methods):
            with tempfile.TemporaryDirectory() as folder:
                mp.spawn(run_rank, (options, name, strategy, folder), nprocs=options.ranks)
                rows.append(json.loads((Path(folder) / "row.json").read_text()))
            sent = sum(rows[-1][what] for what in ("gradients", "gathers", "buffers"))
            dense = sent if name is None else dense
            rows[-1]["of_dense"] = round(sent / dense, 4)
            print(json.dumps(rows[-1]), flush=True)
    if options.out:
        with options.out.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return rows


if __name__ == "__main__":
    main()
