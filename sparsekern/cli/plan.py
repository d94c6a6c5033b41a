"""``sparsekern plan``: what a training will cost, before it runs."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import Progress

import sparsekern
from sparsekern.analysis.plan import (
    CPU_NETWORK,
    DEVICES,
    STRATEGIES,
    Device,
    Layout,
    Machine,
    Prediction,
    Updates,
    cache_file,
    largest,
    measure,
    memory,
    predict,
    repeated_blocks,
    trace,
)
from sparsekern.cli.info import cpu_model
from sparsekern.cli.options import METHOD, NETWORK, RUN, Json, given, sparsity_of, takes
from sparsekern.cli.shell import PlainConsole, error_console, explained, say, stopped, table
from sparsekern.errors import InputError
from sparsekern.lab import Config
from sparsekern.lab.cost import Planned
from sparsekern.lab.options import percent
from sparsekern.lab.recipes import find
from sparsekern.lab.report.tables import Cells, count
from sparsekern.ops import backend
from sparsekern.topology.arguments import check_choice

OF_MODEL = ("sparsity", "block_size", "batch_size", "accumulate", "precision")
"""Options of a run that a model given by --config takes too."""

OPTIONS_OF_RUN = {
    name: RUN[name] for name in ("recipe", "method", "preset", "width", "width_multiplier", "update_every", *OF_MODEL)
}

CPU = "cpu"
MODEL_BLOCK, MODEL_TEXTS, MODEL_TOKENS = 64, 8, 2048
"""Block size, texts a device and tokens a text of a model given by its configuration, where nothing else is given."""


@takes(values=OPTIONS_OF_RUN, network=NETWORK, options=METHOD)
def plan(
    *,
    values: dict[str, Any],
    config: Annotated[
        Path | None,
        typer.Option(help="A model of Transformers, in place of a recipe: its config.json or the folder with it."),
    ] = None,
    strategy: Annotated[str, typer.Option(help=f"How devices share the model: {', '.join(STRATEGIES)}.")] = "single",
    devices: Annotated[int, typer.Option(help="Number of devices.")] = 1,
    device: Annotated[str, typer.Option(help=f"Kind of device: cpu, this one; {', '.join(DEVICES)}.")] = CPU,
    threads: Annotated[
        int | None, typer.Option(help="Threads of the cpu.", show_default="as many as PyTorch takes")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens a text of a model given by --config.")] = MODEL_TOKENS,
    image_size: Annotated[
        int | None, typer.Option(help="Side of the images of a recipe that takes some.", show_default="32; mlp: 8")
    ] = None,
    measured: Annotated[
        bool,
        typer.Option("--measure", help="Measure this machine first, which takes about a minute, and keep the result."),
    ] = False,
    as_json: Json = False,
    network: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """Predict what a training costs: memory, FLOPs, traffic and time of a step, and whether dense were faster.

    The network is built without any memory, so that one of 70 billion parameters can be planned on a laptop.
    """
    errors = error_console()
    with explained(errors, stopped, plan):
        if threads is not None:
            if threads < 1:
                raise InputError(f"threads is {threads}; it must be 1 or more", parameter="threads")
            torch.set_num_threads(threads)
        check_choice("device", device, (CPU, *DEVICES))
        if measured:
            machine = measure_here(errors)
            if not values and config is None:
                say(f"measured {about_text(machine.about)}; kept in {measurement_file()}")
                return
        if "sparsity" in values:
            values["sparsity"] = sparsity_of(",".join(values["sparsity"]))
        if device != CPU and config is None:
            values.setdefault("precision", "bfloat16")
        layout = Layout(strategy, devices)
        if config is None:
            source, found = _of_recipe(
                values | given(network=network or None, options=options or None), layout, image_size
            )
        else:
            if wrong := sorted({*values, *network, *options} - set(OF_MODEL)):
                names = ", ".join(wrong)
                raise InputError(f"config is given, with which {names} do not go; drop one or the other")
            source, found = _of_config(config, values, layout, tokens, device)
        with backend("auto" if device == CPU else "gpu"):
            facts, predictions, notes = planned(source, found, layout, device)
    if as_json:
        say(json.dumps({**facts, "predictions": {name: plain(one) for name, one in predictions.items()}}))
    else:
        PlainConsole().print(table(facts["title"], cells(predictions), 4))
        say("\n".join(notes))


@dataclass(frozen=True)
class Found:
    """What else is known of a source.

    Attributes:
        title: of what is planned.
        updates: of the topology.
        accumulate: passes of a step.
        batch: examples of a step on all devices.
        size: what the source is scaled by, as it is now.
        sizes: from which the largest size that fits is found.
        unit: what one of the size is, in words.
        precision: of the products.
    """

    title: str
    updates: Updates
    accumulate: int
    batch: int
    size: int
    sizes: tuple[int, int, int]
    unit: str
    precision: str


def measurement_file() -> Path:
    """Return where the measurement of this machine is kept, for the present number of threads."""
    return cache_file(cpu_model(), torch.get_num_threads(), torch.__version__, sparsekern.__version__)


def measure_here(errors: Any) -> Machine:
    """Measure this machine with a progress bar, and keep the result."""
    about = {
        "processor": cpu_model(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "sparsekern": sparsekern.__version__,
        "date": date.today().isoformat(),
    }
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task("measuring this machine", total=1.0)
        machine = measure(about, lambda done: progress.update(task, completed=done), time.perf_counter)
    machine.save(measurement_file())
    return machine


def about_text(about: Mapping[str, Any]) -> str:
    """Return in words what was measured and when."""
    return f"{about['processor']}, {count(about['threads'], 'thread')}, torch {about['torch']}, on {about['date']}"


def _of_recipe(values: dict[str, Any], layout: Layout, image_size: int | None) -> tuple[Planned, Found]:
    if image_size is not None and image_size < 1:
        raise InputError(f"image_size is {image_size}; it must be 1 or more", parameter="image_size")
    config = Config(**values)
    recipe = find(config.recipe)
    _check_divides(config.batch_size, layout.devices, config.accumulate)
    small = recipe.needs_image_size and recipe.name == "mlp"
    image = (1 if small else 3, image_size or (8 if small else 32))
    source = Planned(config, layout.devices, image)
    step = source.width_step if recipe.width is not None else 0
    size = config.width // step if step and config.width is not None else round(8 * config.width_multiplier)
    unit = f"{step} features of width, at the same depth" if step else "an eighth of the published channels"
    title = f"{config.network_title}, {percent(config.sparsity)} sparse, blocks of {config.block_size}, {config.method}"
    updates = source.updates()
    size = max(1, size)
    return source, Found(
        title, updates, config.accumulate, config.batch_size, size, (size, 2 * size, 3 * size), unit, config.precision
    )


def _of_config(path: Path, values: dict[str, Any], layout: Layout, tokens: int, device: str) -> tuple[Any, Found]:
    if find_spec("transformers") is None:
        raise InputError("config needs Transformers; run: pip install transformers", parameter="config")
    from sparsekern.integrations.transformers.planned import PlannedModel, read_config

    model = read_config(path)
    sparsity, block = values.get("sparsity", 0.9), values.get("block_size", MODEL_BLOCK)
    accumulate, batch = values.get("accumulate", 1), values.get("batch_size", MODEL_TEXTS * layout.devices)
    precision = values.get("precision", "float32" if device == CPU else "bfloat16")
    _check_divides(batch, layout.devices, accumulate)
    dtype = torch.bfloat16 if precision == "bfloat16" else None
    source = PlannedModel(model, sparsity, block, batch // layout.devices // accumulate, tokens, dtype)
    title = f"{model.model_type} of {source.depth} layers, {percent(sparsity)} sparse, blocks of {block}, static"
    unit = "a layer of the model, at the same width"
    return source, Found(title, Updates(), accumulate, batch, source.depth, (2, 3, 4), unit, precision)


def _check_divides(batch: int, devices: int, accumulate: int) -> None:
    if batch % (devices * accumulate):
        parts = f" in {accumulate} parts each" if accumulate > 1 else ""
        raise InputError(
            f"batch_size is {batch}, which {count(devices, 'device')}{parts} cannot share evenly; give a multiple of "
            f"{devices * accumulate}",
            parameter="batch_size",
        )


def clocked_of(device: str, precision: str) -> Machine | Device:
    """Return what says how long operators take on a device.

    Raises:
        ValueError: this machine was not measured, or not in that precision.
    """
    if device != CPU:
        found = DEVICES[device]
        return found if precision == "bfloat16" else replace(found, dtype="ieee")
    if precision != "float32":
        raise InputError(
            f"precision is {precision}, of which nothing is measured on a CPU; use float32", parameter="precision"
        )
    machine = Machine.load(measurement_file())
    if machine is None:
        threads = torch.get_num_threads()
        raise InputError(
            f"this machine is not measured with {count(threads, 'thread')} yet; run: sparsekern plan --measure "
            f"--threads {threads}",
            parameter="device",
        )
    return machine


def capacity_of(device: str) -> float:
    """Return the bytes of a device's memory; of a CPU those of the machine, as far as the system says."""
    if device != CPU:
        return DEVICES[device].gigabytes * 1e9
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return 0.0


def plain(prediction: Prediction) -> dict[str, Any]:
    """Return a prediction as plain values, with the sums of its parts."""
    sums = {"step_seconds": prediction.step_seconds, "memory_total": prediction.memory.total}
    return asdict(prediction) | sums | {"traffic_step": prediction.traffic.step}


def planned(
    source: Any, found: Found, layout: Layout, device: str
) -> tuple[dict[str, Any], dict[str, Prediction], list[str]]:
    """Predict the costs of the sparse network and of its dense twin, as they are and checkpointed.

    Returns:
        Facts of the plan for JSON, its title among them; the predictions that there are, by network and whether it is
        checkpointed; the lines below the table.
    """
    clocked = clocked_of(device, found.precision)
    sends = CPU_NETWORK if isinstance(clocked, Machine) else clocked.sends(layout.devices)
    predictions: dict[str, Prediction] = {}
    blocks: list[str] = []
    for network in ("sparse", "dense"):
        step = source.step(network)
        blocks = repeated_blocks(step.model)
        here = Layout(layout.strategy, layout.devices, tuple(blocks))
        updates = found.updates if network == "sparse" else Updates()
        for name, names in ((network, []), (f"{network} checkpointed", blocks)):
            if names or name == network:
                predictions[name] = predict(
                    trace(step, names),
                    clocked,
                    layout=here,
                    updates=updates,
                    accumulate=found.accumulate,
                    sends=sends,
                )
    kind = count(layout.devices, "device") if layout.devices > 1 else "one device"
    title = f"{found.title}: {kind} ({device}), {layout.strategy}, {found.batch} examples a step in {found.precision}"
    ratio = predictions["dense"].step_seconds / predictions["sparse"].step_seconds
    constants = _constants(clocked)
    facts: dict[str, Any] = {"title": title, "device": device, "devices": layout.devices, "strategy": layout.strategy}
    facts |= {"constants": constants, "dense_over_sparse": ratio}
    words = "dense is predicted to be faster" if ratio < 1 else "sparse is predicted to be faster"
    notes = [f"{words}: a dense step takes {ratio:.2f} times as long"]
    capacity = capacity_of(device)
    for name, checkpointed in (("sparse", False), ("sparse checkpointed", True)):
        if capacity and name in predictions:
            size = _largest(source, found, layout, checkpointed, capacity)
            facts[f"largest {name}"] = {"size": size, "unit": found.unit, "now": found.size}
            notes.append(
                f"largest {name} network in {capacity / 1e9:.0f} GB: {size} times {found.unit} (now {found.size})"
            )
    if not blocks:
        notes.append("nothing repeats in this network, so nothing is checkpointed")
    return facts, predictions, [*notes, constants]


MOST_PLACES = 2**28
"""Places for blocks in a network that is built only to see what it holds: drawing those of more takes many GB."""


def _largest(source: Any, found: Found, layout: Layout, checkpointed: bool, capacity: float) -> int:
    places = 0

    def total(size: int) -> int:
        nonlocal places
        step = source.scaled(size).step("sparse")
        blocks = repeated_blocks(step.model)
        here = Layout(layout.strategy, layout.devices, tuple(blocks))
        traced = trace(step, blocks if checkpointed else ())
        places = sum(parameter.cells for parameter in traced.parameters)
        return memory(traced, here, found.accumulate).total

    first = largest(total, capacity, found.sizes)
    if first < 8 or places * (first / found.sizes[-1]) ** 2 > MOST_PLACES:
        return first
    return largest(total, capacity, (first // 2, first * 3 // 4, first))  # nearer by


def _constants(clocked: Machine | Device) -> str:
    if isinstance(clocked, Machine):
        return f"times from a measurement of {about_text(clocked.about)}"
    return (
        f"times from the published peaks of {clocked.name}, which no program reaches: they are lower bounds, and "
        "nothing was run there"
    )


ROWS = ("values", "gradients", "optimizer", "index", "buffers", "communication", "activations")


def cells(by_network: Mapping[str, Prediction]) -> Cells:
    """Return the heading and the rows of the table."""
    predictions = list(by_network.values())
    rows = [[name, *(_bytes(getattr(p.memory, name)) for p in predictions)] for name in ROWS]
    rows.append(["peak of a step", *(_bytes(p.memory.total) for p in predictions)])
    rows.append(["FLOPs of a step", *(f"{p.flops / 1e9:,.1f} G" for p in predictions)])
    rows.append(["sent in a step", *(_bytes(p.traffic.gradients + p.traffic.gathers) for p in predictions)])
    rows.append(["sent in an update", *(_bytes(p.traffic.scores + p.traffic.moves) for p in predictions)])
    if any(p.traffic.buffers for p in predictions):
        rows.append(["buffers, where DDP copies them", *(_bytes(p.traffic.buffers) for p in predictions)])
    for part in predictions[0].seconds:
        rows.append([part, *(f"{1e3 * p.seconds[part]:,.2f} ms" for p in predictions)])
    rows.append(["time of a step", *(f"{1e3 * p.step_seconds:,.2f} ms" for p in predictions)])
    return ["on a device", *by_network], rows


def _bytes(number: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number:.0f} B"
