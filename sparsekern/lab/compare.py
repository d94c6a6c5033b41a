"""Several methods on one recipe: a grid of ordinary runs in one folder, and what came out of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from sparsekern.errors import InputError
from sparsekern.files.atomic_files import refuse_link
from sparsekern.lab.config import Config
from sparsekern.lab.cost import training_cost
from sparsekern.lab.formats import CostFile, PlanEntries, checked
from sparsekern.lab.options import OPTIONS, Value
from sparsekern.lab.recipes import find
from sparsekern.lab.report.pictures import draw_comparison, draw_or_warn
from sparsekern.lab.report.tables import comparison_cells, markdown
from sparsekern.lab.resolved import Run, build_places, resolve
from sparsekern.lab.results import score_rows
from sparsekern.lab.run import Interrupted, Observer, resume, start_resolved
from sparsekern.lab.store import (
    CONFIG,
    PLAN,
    is_new,
    locked,
    read_config,
    read_json,
    read_results,
    write_json,
    write_text,
)
from sparsekern.lab.tasks import Task
from sparsekern.lab.train import Learner
from sparsekern.training import METHODS

TABLE, PICTURE, COST = "comparison", "comparison.png", "cost.json"

DENSE = "dense"
"""Name of the cell of the dense twin, which is the same for all methods, sparsities and blocks."""

Sparsity = float | Mapping[str, float]

BASE: dict[str, Any] = {"method": "static", "sparsity": 0.0, "block_size": 1}
"""What is said in place of that in which the cells differ."""


def contestant(text: str, *, preset: bool = False) -> Config:
    """Return a method or a preset with options, the rest being the default.

    Args:
        text: ``NAME`` or ``NAME:option=value,option=value``, such as ``gse:distribution=grabo,subset_factor=2``;
            hyphens in the names of options are underscores, and an option alone is true.
        preset: whether the name is that of a preset.

    Raises:
        ValueError: there is no such method, or it has no such option, or a value of another kind.
    """
    name, _, rest = text.partition(":")
    options: dict[str, Value] = {}
    for part in filter(None, rest.split(",")):
        key, given, value = part.partition("=")
        key = key.strip().replace("-", "_")
        options[key] = OPTIONS[key].parse(value.strip() if given else "true") if key in OPTIONS else value
    return Config(preset=name, options=options) if preset else Config(method=name, options=options)


def _entries(config: Config) -> dict[str, Any]:
    """Return that by which a contestant differs from others."""
    return {"method": config.method, "preset": config.preset, "options": dict(config.options)}


def slug(config: Config) -> str:
    """Return a name of a contestant for a folder, such as ``gse-distribution-grabo``."""
    words = [config.preset or config.method]
    for name, value in config.options.items():
        words += [name.replace("_", "-"), str(value).lower()]
    return "-".join(words)


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Attributes:
        base: what all runs share; its method, sparsity and blocks are those of no cell.
        contestants: methods with options; what else these say does not count.
        sparsities: each with every contestant: numbers, or one for each kind of layers.
        block_sizes: each with every contestant and sparsity.
        dense: whether the dense twin is trained, once a seed.

    Raises:
        ValueError: something is missing or wrong.
    """

    base: Config
    contestants: tuple[Config, ...]
    sparsities: tuple[Sparsity, ...]
    block_sizes: tuple[int, ...]
    dense: bool = True

    def __post_init__(self) -> None:
        for name in ("contestants", "sparsities", "block_sizes"):
            if not getattr(self, name):
                raise InputError(f"{name} is empty; give at least one", parameter=name)
        self.cells()

    def cells(self) -> dict[str, Config]:
        """Return the configurations of all runs by the names of their folders, the dense twin first."""
        alone = replace(self.base, dense=False)
        cells = {}
        if self.dense:
            cells[DENSE] = replace(self.base, sparse=False, options={})
        for block_size in self.block_sizes:
            for sparsity in self.sparsities:
                for one in self.contestants:
                    cell = replace(alone, sparsity=sparsity, block_size=block_size, **_entries(one))
                    cells[f"{slug(one)}-s{cell.sparsity_slug}-b{block_size}"] = cell
        return cells

    def to_json(self) -> dict[str, Any]:
        """Return plain values that :meth:`from_json` reads."""
        return {
            "base": self.base.to_json(),
            "contestants": [_entries(one) for one in self.contestants],
            "sparsities": list(self.sparsities),
            "block_sizes": list(self.block_sizes),
            "dense": self.dense,
        }

    @classmethod
    def from_json(cls, values: Any, where: Path | str = PLAN) -> Plan:
        """Read what :meth:`to_json` returned; raise ValueError if something is wrong in the file ``where``."""
        file = checked(PlanEntries, values, where, "choose another --out")
        return cls(
            Config.from_json(file.base),
            tuple(Config(**vars(entries)) for entries in file.contestants),
            tuple(file.sparsities),
            tuple(file.block_sizes),
            file.dense,
        )


def default_folder(now: datetime) -> Path:
    """Return ``runs/<date-time>-compare``."""
    return Path("runs") / f"{now:%Y%m%d-%H%M%S}-compare"


def read_plan(folder: Path) -> Plan | None:
    """Return the plan of the comparison in a folder; None if there is none yet.

    Raises:
        ValueError: the folder holds something else, or the plan is damaged.
    """
    if (folder / PLAN).is_file():
        return Plan.from_json(read_json(folder / PLAN).get("plan"), folder / PLAN)
    if folder.is_file():
        raise InputError(f"out is {folder}, which is a file; choose the name of a folder for --out", parameter="out")
    if folder.exists() and not is_new(folder):
        raise InputError(
            f"out is {folder}, which holds no comparison and is not empty; choose another --out", parameter="out"
        )
    return None


def plan_for(
    folder: Path,
    values: Mapping[str, Any],
    contestants: Sequence[Config] = (),
    sparsities: Sequence[Sparsity] = (),
    block_sizes: Sequence[int] = (),
    dense: bool | None = None,
) -> Plan:
    """Return the plan of a comparison that begins or goes on in a folder, whose cells it keeps.

    Args:
        folder: of the comparison.
        values: of a :class:`Config`, shared by all runs.
        contestants: none for all methods, or those of the folder.
        sparsities, block_sizes: none for the defaults, or those of the folder.
        dense: whether the dense twin is trained; None for yes, or what the folder has. It can only be added.

    Raises:
        ValueError: the folder holds something else, or a comparison whose runs have other values.
    """
    known = read_plan(folder)
    if known is None:
        base = Config(**{**values, **BASE})
        return Plan(
            base,
            _union((), contestants) or tuple(Config(method=name) for name in METHODS),
            _union((), sparsities) or (find(base.recipe).sparsity,),
            _union((), block_sizes) or (find(base.recipe).block_size,),
            dense is not False,
        )
    has = known.base.to_json()
    for name, value in values.items():
        if value != has[name]:
            raise InputError(
                f"{name} is {value}, but the comparison in {folder} has {has[name]}; drop the option, or choose "
                "another --out",
                parameter=name,
            )
    return Plan(
        known.base,
        _union(known.contestants, contestants),
        _union(known.sparsities, sparsities),
        _union(known.block_sizes, block_sizes),
        known.dense or dense is True,
    )


def compare(plan: Plan, folder: Path, observer: Observer) -> dict[str, Any]:
    """Train what is not trained yet, and write the table and the picture; killed at any moment, the next call goes on.

    Args:
        plan: what :func:`plan_for` returned for the folder.
        folder: of the comparison. Every cell has a run folder in it.
        observer: told what happens.

    Returns:
        The content of ``comparison.json``.

    Raises:
        ValueError: options, data or the folder are not usable; the text names the cell. Found before any training,
            but for a loss that is not finite: that is raised after all other cells.
        Interrupted: the observer asked to stop.
    """
    task = plan.base.load()
    runs: dict[str, Run] = {}
    for name, config in plan.cells().items():
        runs[name] = _resolved(folder / name, name, config, task)
        task = runs[name].task  # on the device: all runs share its data
    with locked(folder):
        write_json(folder / PLAN, {"plan": plan.to_json()})
        return _train(plan, runs, folder, observer)


def _train(plan: Plan, runs: Mapping[str, Run], folder: Path, observer: Observer) -> dict[str, Any]:
    results: dict[str, dict[str, Any]] = {}
    failed = []
    for number, (name, run) in enumerate(runs.items()):
        if not _is_finished(folder / name):
            observer.cell(name, run.config, number, len(runs))
        try:
            results[name] = _results(folder / name, run, observer)
        except Interrupted:
            raise Interrupted(folder) from None
        except InputError as error:  # a loss that is not finite: the other cells are worth having
            failed.append(f"{name}: {error}")
            continue
        rows = score_rows({name: run.config for name, run in runs.items()}, results)
        some = next(iter(results.values()))
        content = {"plan": plan.to_json(), "data": some["data"], "environment": some["environment"], "rows": rows}
        write_text(folder / f"{TABLE}.md", markdown(comparison_cells(rows)))
        content = write_json(folder / f"{TABLE}.json", content)
    if results:
        title = f"{content['data']['name']}, {plan.base.network_title}"
        draw_or_warn(folder / PICTURE, lambda path: draw_comparison(path, title, content["rows"]))
    if failed:
        raise InputError(f"{len(failed)} of {len(runs)} runs failed (the others are in {folder}). {'; '.join(failed)}")
    return content


def _resolved(folder: Path, name: str, config: Config, task: Task) -> Run:
    """Return the run of a cell; raise ValueError if it cannot be trained, or the one in its folder has other options.

    A run that has not begun is put together once here, as its training will, but without the values of the network:
    what depends on its layers, such as one without a block, is said before hours of training in other cells.
    """
    try:
        refuse_link(folder)
        run = resolve(config, task)
        if not (folder / CONFIG).is_file():
            Learner(run, config.networks[0], 0, build_places)
        elif read_config(folder).config != run.config:
            raise InputError(f"the run in {folder} has other options; choose another --out")
    except InputError as error:
        raise InputError(f"{name}: {error}", parameter=error.parameter) from None
    return run


def is_finished(plan: Plan, folder: Path) -> bool:
    """Return whether all runs of a comparison are, so that nothing is left to train."""
    return all(_is_finished(folder / name) for name in plan.cells())


def _is_finished(folder: Path) -> bool:
    return (folder / COST).is_file()


def _results(folder: Path, run: Run, observer: Observer) -> dict[str, Any]:
    """Return the results of a cell, trained to its end, and its ``"cost"``."""
    file = folder / COST
    if _is_finished(folder):
        way_out = "delete it, and the next call makes it anew"
        return read_results(folder) | {"cost": checked(CostFile, read_json(file), file, way_out).cost}
    begun = (folder / CONFIG).is_file()
    finished = resume(folder, observer) if begun else start_resolved(run, folder, observer)
    cost = training_cost(run, run.config.networks[0])
    write_json(file, {"cost": cost})  # last: it says that the cell is finished
    return finished.results | {"cost": cost}


def _union(first: Sequence[Any], second: Sequence[Any]) -> tuple[Any, ...]:
    """Return the entries of both, each once, in their order."""
    entries = [*first, *second]
    return tuple(entry for place, entry in enumerate(entries) if entry not in entries[:place])
