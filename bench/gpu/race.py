"""The comparison: the package, cuBLAS and other block-sparse libraries take turns in one process.

An answer is checked before it is timed; a wrong one is recorded and not timed. One row per contestant and case. Cases
are in the order of what they are worth, so that a budget that ends early cuts off the least.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from sparsekern.kernels.gpu.launch import dot_precision

from bench.gpu import peers
from bench.gpu.contestants import DENSE, OURS, SPARSE, Contestant, cublas, sparsekern_gpu
from bench.gpu.goals import AROUND_BREAK_EVEN, ORDER
from bench.gpu.part import Part, main, say_what_failed
from bench.gpu.results import Row
from bench.gpu.scene import OPS, Case, Judge, Scene, make_scene
from sparsekern.analysis.clock import Clock, check_device

SHAPES = ((1024, 4096), (4096, 11008), (8192, 8192))
"""(K, N), beside 4096 x 4096."""

Maker = Callable[[Scene, str], Contestant]


def cases() -> list[Case]:
    """Return all cases, most valuable first."""
    ordered = (
        *_series("step", sparsities=(0.9, 0.95)),
        *(Case("step", "bf16", 8192, 4096, 4096, b, s) for b in ORDER for s in AROUND_BREAK_EVEN[b]),
        *_series("fwd", tokens=16, sparsities=(0.9,)),
        *(c for op in ("fwd", "dx", "dvalues") for c in _series(op, sparsities=(0.9,))),
        *(c for tokens in (2048, 32768, 16) for c in _series("step", tokens=tokens, sparsities=(0.9, 0.95))),
        *(c for shape in SHAPES for c in _series("step", shape=shape, sparsities=(0.9, 0.95))),
        *(c for dtype in ("fp16", "fp32") for c in _series("step", dtype=dtype, sparsities=(0.9, 0.95))),
        *_series("step", sparsities=(0.9,), draw="balanced"),
        *_series("step", sparsities=(0.5, 0.7, 0.8, 0.99)),
        *(c for op in ("fwd", "dx", "dvalues") for c in _series(op, sparsities=(0.5, 0.7, 0.8, 0.95, 0.99))),
        *_series("fwd", tokens=16, sparsities=(0.5, 0.7, 0.95, 0.99)),
        *(c for op in ("fwd", "dx", "dvalues") for c in _series(op, dtype="fp32", sparsities=(0.9,))),
        *(c for shape in SHAPES for c in _series("fwd", tokens=16, shape=shape, sparsities=(0.9,))),
    )
    return list(dict.fromkeys(ordered))


def headline_cases() -> list[Case]:
    """Return those that the goals are about."""
    return cases()[: 2 * len(ORDER)]


def _series(
    op: str,
    *,
    dtype: str = "bf16",
    tokens: int = 8192,
    shape: tuple[int, int] = (4096, 4096),
    sparsities: tuple[float, ...],
    draw: str = "random",
) -> Iterator[Case]:
    for sparsity in sparsities:
        for block in ORDER:
            yield Case(op, dtype, tokens, *shape, block, sparsity, draw)


def rehearsal_cases() -> list[Case]:
    """Return a few tiny cases in which everything occurs."""
    tiny = [Case(op, "fp32", 64, 64, 128, 16, 0.5) for op in OPS]
    return [
        *tiny,
        Case("fwd", "fp16", 16, 64, 128, 16, 0.9),  # no bf16: the interpreter multiplies its bits as integers
        *(Case("step", "fp16", 64, 64, 128, b, s) for b in (32, 64) for s in (0.5, 0.75)),
        Case("step", "fp16", 64, 64, 128, 32, 0.75, "balanced"),
    ]


def makers(rehearsal: bool) -> dict[str, Maker]:
    """Return who takes part."""
    found: dict[str, Maker] = {"sparsekern": sparsekern_gpu, "cublas": cublas}
    for name in ["torch-bsr"] if rehearsal else peers.present():
        found[name] = lambda scene, op, name=name: peers.peer(name, scene, op)  # type: ignore[misc]
    return found


def run(part: Part) -> bool:
    """Run the cases that are not in the results yet; return whether all are."""
    for package in peers.absent():
        print(f"race: {package} is not installed and takes no part: pip install {package}")
    return race_cases(part, rehearsal_cases() if part.rehearsal else cases(), makers(part.rehearsal))


def race_cases(
    part: Part,
    chosen: Sequence[Any],
    taking_part: Mapping[str, Any],
    make: Callable[[Any, torch.device], Any] = make_scene,
) -> bool:
    """Run the cases that are not in the results yet, most valuable first; return whether all are."""
    clock = Clock(part.device, device_alone=True)
    torch.set_float32_matmul_precision("high")  # float32 is tf32 for everyone
    name = part.results.common["part"]
    for number, case in enumerate(chosen, 1):
        if part.results.has(case.key):
            continue
        if part.over(0.0 if part.rehearsal else 5.0):
            print(f"{name}: {number - 1} of {len(chosen)} cases; the budget is over")
            return False
        part.results.begin(case.key)
        try:
            run_case(part, clock, case, taking_part, make)
        except Exception as error:  # such as a GPU too small for the case
            print(f"{name}: {case.key}: {say_what_failed(error)}")
            part.results.add({"key": case.key, "error": say_what_failed(error)})
            check_device(part.device)
    return True


def run_case(
    part: Part,
    clock: Clock,
    case: Any,
    taking_part: Mapping[str, Any],
    make: Callable[[Any, torch.device], Any] = make_scene,
) -> None:
    """Check all contestants on a case, time those that are right, and add the rows; ``make`` draws its numbers."""
    scene = make(case, part.device)
    judge = Judge(scene, case.op)
    fields = case._asdict() | {"stored_elements": scene.elements, "precision": dot_precision(scene.dtype)}
    right: dict[str, Contestant] = {}
    for name, maker in taking_part.items():
        key = f"{case.key} | {name}"
        if part.results.has(key):
            continue  # it took the GPU down with it, the last time
        try:
            contestant = maker(scene, case.op)
            answer = contestant.answer(contestant.run())
            wrong = judge.wrong(answer, by_element=contestant.kind == OURS)
            reason = None if wrong is None else {"refused": wrong}
        except peers.NotSupported as error:
            reason = {"not_supported": str(error)}
        except Exception as error:
            reason = {"error": say_what_failed(error)}
        if reason is None:
            right[name] = contestant
        else:
            print(f"race: {key}: {reason}")
            part.results.add({"key": key, **fields, "contestant": name, **reason})
            check_device(part.device)
    del judge
    rounds = 1 if part.rehearsal else 20
    timings, errors = clock.race({n: c.run for n, c in right.items()}, rounds, seconds=1.5)
    rows: list[Row] = []
    for name, timing in timings.items():
        rows.append({"key": f"{case.key} | {name}", **fields, "contestant": name, "kind": right[name].kind})
        rows[-1] |= {"ms": timing.median, "p20": timing.quantile(0.2), "p80": timing.quantile(0.8)}
        rows[-1] |= {"wall_ms": timing.wall_ms, "samples": len(timing.samples)}
        if clock.cuda and case.op == "step" and right[name].kind != SPARSE:
            rows[-1] |= replayed(clock, right[name])
    compare(rows, case)
    rows += [
        {"key": f"{case.key} | {n}", **fields, "contestant": n, "error": say_what_failed(e)} for n, e in errors.items()
    ]
    part.results.add(*rows, {"key": case.key, "contestants": len(timings)})
    print("race: " + case.key + ": " + ", ".join(f"{r['contestant']} {r['ms']:.3f} ms" for r in rows if "ms" in r))


def replayed(clock: Clock, contestant: Contestant) -> Row:
    """Return how long a replay of a CUDA graph takes: neither Python nor gaps between kernels are in it."""
    try:
        return {"graph_ms": clock.replay_ms(contestant.run)}
    except Exception as error:
        check_device(clock.device)
        return {"graph_error": say_what_failed(error)}


def compare(rows: list[Row], case: Any) -> None:
    """Add rates and ratios to the rows of one case: ``vs_dense`` 2.0 is twice as fast as the best dense one."""
    best = {
        kind: min((row for row in rows if row["kind"] == kind), key=lambda row: row["ms"], default=None)
        for kind in (DENSE, SPARSE)
    }
    for row in rows:
        flops = (3 if case.op == "step" else 1) * 2 * case.tokens * row["stored_elements"]
        row["tflops"] = flops / row["ms"] / 1e9
        for kind, peer in best.items():
            row[f"vs_{kind}"] = None if peer is None else peer["ms"] / row["ms"]
            row[f"wall_vs_{kind}"] = None if peer is None else peer["wall_ms"] / row["wall_ms"]
            both = peer is not None and {"graph_ms"} <= peer.keys() & row.keys()
            row[f"graph_vs_{kind}"] = peer["graph_ms"] / row["graph_ms"] if peer and both else None
            row[f"best_{kind}"] = None if peer is None else peer["contestant"]


if __name__ == "__main__":
    sys.exit(main("race", __doc__, run))
