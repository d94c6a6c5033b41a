"""The cost of a step: bytes on a device, bytes sent, FLOPs, and seconds with what they are spent on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sparsekern.analysis.plan.machine import Clocked
from sparsekern.analysis.plan.operation import GROUPS, SPARSE
from sparsekern.analysis.plan.parallel import Layout, Memory, Traffic, Updates, memory, traffic
from sparsekern.analysis.plan.trace import Calls, Trace

UPDATES, COMMUNICATION = "updates of the topology", "communication"

PARTS = (*GROUPS, UPDATES, COMMUNICATION)
"""What the time of a step is spent on."""


@dataclass(frozen=True)
class Prediction:
    """The cost of a step.

    Attributes:
        flops: floating point operations of the products of a step on one device, without those of updates.
        memory: bytes on the device that holds most.
        traffic: bytes that a device sends.
        seconds: by :data:`PARTS`. Communication is what computing does not hide.
    """

    flops: int
    memory: Memory
    traffic: Traffic
    seconds: Mapping[str, float]

    @property
    def step_seconds(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())


def predict(
    trace: Trace,
    clocked: Clocked,
    *,
    layout: Layout | None = None,
    updates: Updates | None = None,
    accumulate: int = 1,
    sends: float = 1.0,
) -> Prediction:
    """Predict the cost of a step.

    Args:
        trace: of a step on a device's part of the batch, or of one of ``accumulate`` parts of that.
        clocked: says how long an operation takes.
        layout: of the model over devices. Default: one device.
        updates: of the topology. Default: none.
        accumulate: passes of a step.
        sends: bytes a second that a device sends.
    """
    layout, updates = layout or Layout(), updates or Updates()
    forward, backward = (_seconds(calls, clocked, updates.masked) for calls in (trace.forward, trace.backward))
    seconds: dict[str, float] = _seconds(trace.update, clocked)
    for pass_, times in ((forward, accumulate * (1 + updates.forwards)), (backward, accumulate)):
        seconds = {group: seconds[group] + times * spent for group, spent in pass_.items()}
    sent = traffic(trace.parameters, layout, updates, accumulate)
    hidden = accumulate * sum(backward.values()) + (accumulate * sum(forward.values()) if layout.sharded else 0.0)
    seconds[UPDATES] = _update_seconds(trace, clocked, updates) * accumulate / max(1, updates.every)
    seconds[COMMUNICATION] = max(0.0, sent.step / sends - hidden)
    extra = updates.forwards * sum(op.flops * n for op, n in trace.forward.items())
    return Prediction(
        flops=round(accumulate * (trace.flops + extra)),
        memory=memory(trace, layout, accumulate),
        traffic=sent,
        seconds={part: seconds.get(part, 0.0) for part in PARTS},
    )


def _seconds(calls: Calls, clocked: Clocked, masked: float = 1.0) -> dict[str, float]:
    """Return the seconds of calls by group; ``masked`` is the part of the blocks with which products compute."""
    spent = dict.fromkeys(GROUPS, 0.0)
    for operation, count in calls.items():
        if operation.group == SPARSE and masked < 1:
            operation = operation.scaled(masked)
        spent[operation.group] += count * clocked.seconds(operation)
    return spent


def _update_seconds(trace: Trace, clocked: Clocked, updates: Updates) -> float:
    """Return the seconds of the scores of an update: products like those for the gradients of the stored blocks."""
    slots = sum(p.slots * p.block for p in trace.parameters)
    if not updates.every or not slots:
        return 0.0
    places = sum(p.cells * p.block for p in trace.parameters)
    scored = updates.candidates * slots + (places if updates.scores_all else 0)
    each = [
        (operation.scaled(scored / slots / 2), count)  # the backward computes dx too
        for operation, count in trace.backward.items()
        if operation.group == SPARSE and operation.kind.endswith("backward")
    ]
    return sum(count * clocked.seconds(operation) for operation, count in each) if scored else 0.0


def largest(total: Callable[[int], int], capacity: float, sizes: tuple[int, int, int]) -> int:
    """Return the largest size whose bytes fit into a memory, along the parabola through three sizes; 0 if none does.

    Bytes grow with the square of a network's width and linearly with its depth, but for the rounding to whole blocks.

    Args:
        total: bytes at a size.
        capacity: bytes of the memory.
        sizes: the sizes to ask about, ascending.
    """
    (x0, y0), (x1, y1), (x2, y2) = ((x, total(x)) for x in sizes)
    slope = (y1 - y0) / (x1 - x0)
    bend = max(0.0, ((y2 - y1) / (x2 - x1) - slope) / (x2 - x0))  # y = y0 + slope (x - x0) + bend (x - x0) (x - x1)
    linear = slope - bend * (x0 + x1)
    constant = y0 - slope * x0 + bend * x0 * x1 - capacity
    if constant > 0:
        return 0
    root = math.sqrt(linear**2 - 4 * bend * constant)
    return math.floor(-2 * constant / (linear + root))
