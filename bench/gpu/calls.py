"""The calls that are worth tuning, and doing one of them with a given configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from sparsekern.kernels.gpu import tables
from sparsekern.kernels.gpu.config import Config, Problem, problem
from sparsekern.kernels.gpu.launch import arch, dot_precision

from bench.gpu import cases_conv2d, contestants, contestants_conv2d, scene, scene_conv2d
from bench.gpu.goals import AROUND_BREAK_EVEN, ORDER
from bench.gpu.scene import DTYPES, NORMS, Case
from sparsekern.topology import blocks_at

Launch = tables.Launch
AnyCase = Case | scene_conv2d.Case
AnyScene = scene.Scene | scene_conv2d.Scene


def calls(rehearsal: bool) -> list[AnyCase]:
    """Return the calls to tune, most valuable first: what the races time first is tuned first.

    Where two are the same problem, the first one counts.
    """
    if rehearsal:
        return [
            Case("fwd", "fp16", 64, 64, 128, 16, 0.5),
            Case("dx", "fp16", 64, 64, 128, 32, 0.5),
            Case("dvalues", "fp32", 64, 64, 128, 16, 0.5),
            Case("fwd", "fp32", 16, 64, 128, 16, 0.5),
            *(Case(op, "fp16", 64, 64, 128, 16, 0.5) for op in NORMS),
            *cases_conv2d.calls(rehearsal),
        ]
    convolutions = cases_conv2d.calls(rehearsal)
    return [
        *_calls("bf16", 8192, (0.9, 0.95)),
        *convolutions[:12],  # those of the first four steps
        *(c for b, around in AROUND_BREAK_EVEN.items() for c in _calls("bf16", 8192, around, blocks=(b,))),
        *_calls("bf16", 16, (0.9, 0.95), ("fwd", "dx")),
        *convolutions[12:],
        *_calls("bf16", 2048, (0.9, 0.95)),
        *_calls("bf16", 32768, (0.9, 0.95)),
        *_calls("fp32", 8192, (0.9, 0.95)),
        *_calls("bf16", 8192, (0.5, 0.7, 0.8, 0.99)),
        *_calls("bf16", 16, (0.5, 0.75), ("fwd", "dx")),
        *_calls("bf16", 8192, (0.9,), NORMS, blocks=(64, 32)),
    ]


def headlines(rehearsal: bool) -> list[AnyCase]:
    """Return the calls of which the headlines of the race consist: the first to be tuned."""
    return calls(rehearsal)[: 3 if rehearsal else 24]


def _calls(
    dtype: str,
    tokens: int,
    sparsities: tuple[float, ...],
    ops: tuple[str, ...] = ("fwd", "dx", "dvalues"),
    blocks: tuple[int, ...] = ORDER,
) -> Iterator[Case]:
    for sparsity in sparsities:
        for block in blocks:
            yield from (Case(op, dtype, tokens, 4096, 4096, block, sparsity) for op in ops)


def problem_of(case: AnyCase, device: torch.device, few_tokens: int) -> Problem:
    """Return what a call's configuration is chosen by; ``few_tokens`` is where the decoding kernels end."""
    if isinstance(case, scene_conv2d.Case):
        return _problem_of_conv2d(case, device)
    cols, rows = case.in_features // case.block, case.out_features // case.block
    kernel = f"few_{case.op}" if case.op in ("fwd", "dx") and case.tokens <= few_tokens else case.op
    slots = rows * cols if case.op == "all_block_norms" else max(1, blocks_at(case.sparsity, rows * cols))
    dtype = DTYPES[case.dtype]
    majors = cols if case.op == "dx" else rows
    block = (case.block, case.block)
    return problem(kernel, arch(device), dtype, dot_precision(dtype), block, case.tokens, slots, majors)


def _problem_of_conv2d(case: scene_conv2d.Case, device: torch.device) -> Problem:
    """Return what :mod:`sparsekern.kernels.gpu.conv2d` asks the tables for."""
    shape, dtype, block = case.shape, DTYPES[case.dtype], (case.block, case.block)
    rows, per_tap = shape.block_rows(case.block), shape.block_cols(case.block)
    cells, tokens, majors = rows * shape.taps * per_tap, case.tokens, rows
    slots = cells if case.op == "all_block_norms" else max(1, blocks_at(case.sparsity, cells))
    if case.op == "dx":  # a phase of the stride at a time
        phases, pixels = case.stride**2, (-(-case.size // case.stride)) ** 2
        tokens, majors = case.images * pixels, phases * per_tap
    return problem(f"conv2d_{case.op}", arch(device), dtype, dot_precision(dtype), block, tokens, slots, majors)


def scene_of(case: AnyCase, device: torch.device) -> AnyScene:
    """Draw the numbers of a call."""
    if isinstance(case, scene_conv2d.Case):
        return scene_conv2d.make_scene(case, device)
    return scene.make_scene(case, device)


def ours(of: AnyScene, op: str) -> contestants.Contestant:
    """Return the package's kernels on these numbers."""
    if isinstance(of, scene_conv2d.Scene):
        return contestants_conv2d.sparsekern_gpu(of, op)
    return contestants.sparsekern_gpu(of, op)


@contextmanager
def choosing(choose: Callable[[Problem, Launch], Config]) -> Iterator[None]:
    """Let ``choose`` decide on configurations instead of the tables; one that does not run is an error."""
    before = tables.run
    tables.run = lambda which, launch, exact: launch(choose(which, launch))
    try:
        yield
    finally:
        tables.run = before


def call_with(of: AnyScene, op: str, config: Config) -> object:
    """Do one call with a configuration and return what it gave."""
    with choosing(lambda which, launch: config):
        return ours(of, op).run()
