"""Sparse-IFT at equal FLOPs: ``python -m bench.sparse_ift_table --network resnet18`` for one JSON line a row.

Each transform at 50, 75 and 90 %: multiply-adds asked for and got, what is stored, what a step keeps for its backward,
and the milliseconds of CPU time of a step (forward, backward, SGD), in turns with the dense network. ``--show FILE``
prints the rows as a table.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparsekern as sk
from sparsekern.analysis import profile, race, stored_parameters, training_bytes
from sparsekern.lab.models import gpt_small, resnet18_cifar, vgg16
from sparsekern.transforms import TRANSFORMS, Width, transform

MIB = 2**20
SPARSITIES = (0.5, 0.75, 0.9)


@dataclass(frozen=True)
class Network:
    """A network, the input for which FLOPs are counted, that of a measured step, its blocks, and what stays dense."""

    build: Callable[[Width], nn.Module]
    counted: Tensor
    stepped: Tensor
    block: int
    ignore: tuple[str, ...]
    activation: Callable[[], nn.Module] = nn.ReLU


IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
TEXT = torch.randint(50257, (1, 1024), generator=torch.Generator().manual_seed(0))

NETWORKS = {
    "resnet18": Network(lambda width: resnet18_cifar(100, 3, width), IMAGES[:1], IMAGES, 32, ("conv1", "fc")),
    "vgg16": Network(lambda width: vgg16(100, 3, width), IMAGES[:1], IMAGES, 32, ("features.0", "fc")),
    "gpt-small": Network(lambda width: gpt_small(width_multiplier=width), TEXT, TEXT[:, :128], 64, (), nn.GELU),
}


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Return the bytes that a forward pass keeps for the backward, without the model's own tensors."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = model(x)
        size = sum(kept.values())  # while y is alive, and with it all that is kept: no address comes twice
    del y
    return size


def step_of(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """Return a whole training step."""
    if x.dim() == 4:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def cpu_times(steps: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Return the median milliseconds of CPU time of each; they take turns.

    CPU time is that of all threads: with one, the time of a step on a machine that has nothing else to do.
    """
    timings = race(steps, torch.device("cpu"), repeats, watch=time.process_time)
    return {name: timing.median for name, timing in timings.items()}


def described(model: nn.Module, network: Network) -> dict[str, Any]:
    """Return what a network stores, keeps and computes."""
    layers = sk.sparse_layers(model).values()
    cells = sum(layer.grid.numel for layer in layers)
    return {
        "multiply_adds": profile(model, network.counted).multiply_adds,
        "absent": round(1 - sum(layer.topology.elements() for layer in layers) / cells, 4) if cells else 0.0,
        "parameters": stored_parameters(model),
        "mib": round(training_bytes(model) / MIB, 1),
        "activations_mib": round(kept_bytes(model, network.stepped) / MIB, 1),
    }


def rows(network: Network, sparsities: Sequence[float], repeats: int) -> Iterator[dict[str, Any]]:
    """Build, count and race; one sparsity at a time, so that five networks are in memory."""
    options: dict[str, Any] = {"block_size": network.block, "ignore": network.ignore, "activation": network.activation}
    dense = transform(network.build, "wide", 0, network.counted)
    steps: dict[str, Callable[[], None]] = {"dense": step_of(dense, network.stepped)}
    asked = described(dense, network)
    for sparsity in sparsities:
        steps = {"dense": steps["dense"]}
        found: dict[str, dict[str, Any]] = {}
        for name in TRANSFORMS:
            row: dict[str, Any] = {"transform": name, "sparsity": sparsity, "match": "network"}
            try:
                model = transform(network.build, name, sparsity, network.counted, **options)
            except ValueError as error:
                yield row | {"refused": str(error)}
                row["match"] = "layers"
                model = transform(network.build, name, sparsity, network.counted, match="layers", **options)
            steps[name] = step_of(model, network.stepped)
            found[name] = row | described(model, network)
            del model
        times = cpu_times(steps, repeats)
        yield {"transform": "dense", "sparsity": 0.0, **asked, "cpu_ms": round(times["dense"], 1), "beside": sparsity}
        for name, row in found.items():
            error = row["multiply_adds"] / asked["multiply_adds"] - 1
            ratio = times[name] / times["dense"]
            yield row | {
                "asked": asked["multiply_adds"],
                "error": error,
                "cpu_ms": round(times[name], 1),
                "x_dense": ratio,
            }


HEAD = (
    "network",
    "transform",
    "sparsity",
    "absent",
    "asked",
    "got",
    "error",
    "parameters",
    "MiB",
    "kept MiB",
    "CPU ms",
    "x dense",
)


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Return the rows as Markdown; the dense rows are those beside 50 %."""
    text = ["| " + " | ".join(HEAD) + " |", "| --- | --- |" + " ---: |" * (len(HEAD) - 2)]
    for row in lines:
        if "refused" in row or row.get("beside", SPARSITIES[0]) != SPARSITIES[0]:
            continue
        name = row["transform"] + (" (sparse layers matched)" if row.get("match") == "layers" else "")
        cells = [row["network"], name, f"{row['sparsity']:.0%}", f"{row['absent']:.1%}"]
        cells += [f"{row[key]:,}" if key in row else "" for key in ("asked", "multiply_adds")]
        cells += [f"{row['error']:+.1e}" if "error" in row else "", f"{row['parameters']:,}"]
        cells += [str(row["mib"]), str(row["activations_mib"]), str(row["cpu_ms"])]
        cells += [f"{row['x_dense']:.2f}" if "x_dense" in row else "1"]
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print, or show what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", choices=NETWORKS, default="resnet18")
    parser.add_argument("--sparsity", type=float, nargs="+", default=SPARSITIES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--show", type=Path)
    options = parser.parse_args(argv)
    if options.show is not None:
        print(table([json.loads(line) for line in options.show.read_text().splitlines()]))
        return
    network = NETWORKS[options.network]
    about = {
        "network": options.network,
        "input": list(network.stepped.shape),
        "counted": list(network.counted.shape),
        "block": network.block,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "date": date.today().isoformat(),
    }
    for row in rows(network, options.sparsity, options.repeats):
        print(json.dumps(about | row), flush=True)


if __name__ == "__main__":
    main()
