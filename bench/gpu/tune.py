"""Measures the configurations of the package's roofline on real tensors and writes the table that the package reads.

``tune.jsonl`` has the time of every configuration, so that the roofline can be calibrated; ``sm_90.json`` (the name is
that of the architecture) has the fastest of each problem and becomes ``kernels/gpu/configs/sm_90.json``. A
configuration whose answer is wrong is recorded and not timed. float16 gets the choices of bfloat16: they are the same
size and the same instructions.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict

import torch
from sparsekern.kernels.gpu import roofline, tables
from sparsekern.kernels.gpu.config import Config, Problem
from torch import Tensor

from bench.gpu.calls import AnyCase, Launch, call_with, calls, choosing, ours, problem_of, scene_of
from bench.gpu.compile_ahead import compile_side_by_side
from bench.gpu.contestants import named
from bench.gpu.part import Part, main, say_what_failed
from bench.gpu.results import Row, write_json
from bench.gpu.scene import Judge
from sparsekern.analysis.clock import Clock, DeviceLost, check_device

COMPILING = 0.5
"""Share of the budget that compiling side by side may take."""


def run(part: Part) -> bool:
    """Tune what is not in the results yet; return whether all is."""
    from sparsekern.kernels.gpu.linear import FEW_TOKENS

    torch.set_float32_matmul_precision("high")
    waiting: dict[str, tuple[Problem, AnyCase]] = {}
    for case in calls(part.rehearsal):
        which = problem_of(case, part.device, FEW_TOKENS)
        if which.key not in waiting and not part.results.has(which.key):
            waiting[which.key] = (which, case)
    if not waiting:
        return True
    compile_side_by_side(part, COMPILING)
    clock = Clock(part.device, device_alone=True)
    for key, (which, case) in waiting.items():
        if part.over(0.0 if part.rehearsal else 8.0):
            print(f"tune: the budget is over before {key}")
            return False
        part.results.begin(key)
        try:
            tune_one(part, clock, which, case)
        except Exception as error:  # such as a GPU too small for the call
            print(f"tune: {key}: {say_what_failed(error)}")
            part.results.add({"key": key, "error": say_what_failed(error)})
            check_device(part.device)
    return True


def tune_one(part: Part, clock: Clock, which: Problem, case: AnyCase) -> None:
    """Time the configurations of one problem, add a row for each and one for the problem, and write the fastest."""
    scene = scene_of(case, part.device)
    judge = Judge(scene, case.op)
    configs = roofline.candidates(which)[: 2 if part.rehearsal else None]
    rows: dict[Config, Row] = {}
    for rank, config in enumerate(configs):
        problem = {"problem": which._asdict(), "kind": type(config).__name__, "config": asdict(config)}
        rows[config] = {"key": f"{which.key} | {rank}", **problem, "predicted": roofline.cost(which, config)}
        try:
            wrong = judge.wrong(named(case.op, call_with(scene, case.op, config)), by_element=True)
            rows[config] |= {} if wrong is None else {"refused": wrong}
        except Exception as error:
            rows[config] |= {"error": say_what_failed(error)}
            try:
                check_device(part.device)
            except DeviceLost:  # written down first: which configuration it was
                part.results.add(*rows.values(), {"key": which.key, "error": f"{config} takes the GPU down"})
                raise
    del judge
    good = [c for c in configs if not {"error", "refused"} & rows[c].keys()]

    def choose(asked: Problem, launch: Launch) -> Config:
        assert asked == which, f"{asked} was asked for, not {which}"

        def noted(config: Config) -> Tensor:
            launched.append(config)
            return launch(config)

        def seconds(call: Callable[[], object]) -> float:
            time = clock.median_seconds(call)
            rows[launched[-1]]["ms"] = time * 1e3
            return time

        # All of them are right by the judge; here each is compared with the best guess.
        chosen.append(tables.fastest(good, noted, launch(good[0]).clone(), seconds))
        return chosen[-1]

    chosen: list[Config] = []
    launched: list[Config] = []
    problem_row: Row = {"key": which.key, "call": case.key}
    if good:
        with choosing(choose):
            ours(scene, case.op).run()
        tables.write(which, chosen[0])
        if which.dtype == "bf16":
            tables.write(which._replace(dtype="fp16"), chosen[0])
        if part.rehearsal:
            mark_rehearsal(part, which)
        problem_row |= {"chosen": asdict(chosen[0]), "ms": rows[chosen[0]]["ms"], "rank": configs.index(chosen[0])}
        print(f"tune: {which.key}: {problem_row['ms']:.4f} ms, guess {problem_row['rank'] + 1} of {len(configs)}")
    else:
        problem_row["error"] = f"none of {len(configs)} configurations is right"
        print(f"tune: {which.key}: {problem_row['error']}")
    part.results.add(*rows.values(), problem_row)


def mark_rehearsal(part: Part, which: Problem) -> None:
    """Say in the table that it means nothing."""
    path = part.out / f"{which.arch}.json"
    write_json(path, {"rehearsal": True, **json.loads(path.read_text())})


if __name__ == "__main__":
    sys.exit(main("tune", __doc__, run))
