"""The convolutions that are raced, and the calls of them that are tuned."""

from __future__ import annotations

from collections.abc import Iterator

from bench.gpu.scene import NORMS
from bench.gpu.scene_conv2d import Case

SHAPES = ((128, 16, 256, 1), (128, 8, 512, 1), (128, 32, 128, 1), (128, 16, 256, 2), (32, 8, 256, 1))
"""Images, rows and columns, channels, stride: the layers of a ResNet on small images."""


def cases() -> list[Case]:
    """Return all cases, most valuable first."""
    head = SHAPES[:2]
    ordered = (
        *_series("step", head, (64,), (0.9, 0.95)),
        *_series("step", SHAPES[2:], (64,), (0.9,)),
        *(c for op in ("fwd", "dx", "dvalues") for c in _series(op, head, (64,), (0.9,))),
        *_series("step", head, (32, 128), (0.9,)),
        *_series("step", head, (64,), (0.5, 0.75)),
        *_series("step", head, (64,), (0.9,), dtype="fp32"),
    )
    return list(dict.fromkeys(ordered))


def _series(
    op: str,
    shapes: tuple[tuple[int, int, int, int], ...],
    blocks: tuple[int, ...],
    sparsities: tuple[float, ...],
    dtype: str = "bf16",
) -> Iterator[Case]:
    for sparsity in sparsities:
        for block in blocks:
            for images, size, channels, stride in shapes:
                yield Case(op, dtype, images, size, channels, channels, stride, block, sparsity)


def rehearsal_cases() -> list[Case]:
    """Return a few tiny cases in which everything occurs."""
    tiny = [Case(op, "fp32", 1, 4, 32, 32, 1, 16, 0.5) for op in ("fwd", "dx", "dvalues", "step")]
    return [*tiny, Case("step", "fp16", 2, 5, 32, 64, 2, 32, 0.5)]


def calls(rehearsal: bool) -> list[Case]:
    """Return the calls that are worth tuning, most valuable first: those of which the raced steps consist."""
    if rehearsal:
        tiny = rehearsal_cases()[0]
        strided = tiny._replace(dtype="fp16", size=5, stride=2, block=32)
        return [tiny, strided._replace(op="dx"), *(tiny._replace(op=op) for op in ("dvalues", *NORMS))]
    raced, halves = cases(), ("fwd", "dx", "dvalues")
    steps = [case._replace(op=op) for case in raced if case.op == "step" for op in halves]
    norms = [raced[0]._replace(op=op, block=block) for block in (64, 32) for op in NORMS]
    return list(dict.fromkeys([*steps, *norms]))
