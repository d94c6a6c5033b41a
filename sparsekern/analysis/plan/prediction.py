"""The cost of a step: bytes on a device, bytes sent, FLOPs, and seconds with what they are spent on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from sparsekern.analysis.plan.machine import GROUPS, SPARSE, Clocked
from sparsekern.analysis.plan.trace import Calls, Parameter, Trace
from sparsekern.errors import InputError
from sparsekern.topology.arguments import check_choice

STRATEGIES = ("single", "ddp", "fsdp2")

SCORE, KEY, MOVE, LAYER, AGREEMENT, FLAG = 4, 4, 12, 8, 16, 4
"""Bytes of a score; of a place; of a move: slot and coordinates; of the moves of a layer besides; of what all ranks
compare; and of whether all gradients that an update reads are finite."""


@dataclass(frozen=True)
class Layout:
    """How a model is laid out over devices.

    Attributes:
        strategy: ``"single"``; ``"ddp"``, a whole model on each; or ``"fsdp2"``, all parameters sharded along their
            first axis, each of ``blocks`` gathered when it computes.
        devices: how many.
        blocks: names of the modules that FSDP2 gathers one at a time; all other parameters stay gathered in a step.

    Raises:
        ValueError: an unknown strategy, or a number of devices that it does not take.
    """

    strategy: str = "single"
    devices: int = 1
    blocks: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_choice("strategy", self.strategy, STRATEGIES)
        if self.devices < 1:
            raise InputError(f"devices is {self.devices}; it must be 1 or more", parameter="devices")
        if self.strategy == "single" and self.devices > 1:
            raise InputError(
                f"strategy is 'single' and devices is {self.devices}; use ddp or fsdp2 for several devices",
                parameter="strategy",
            )

    @property
    def sharded(self) -> bool:
        """Whether each device holds a part of each parameter only."""
        return self.strategy == "fsdp2"

    def part(self, size: int, parameter: Parameter) -> int:
        """Return the bytes of a tensor along a parameter on the device that holds most: ``ceil(rows / n)`` rows."""
        if not self.sharded or parameter.rows == 0:
            return size
        return math.ceil(size * math.ceil(parameter.rows / self.devices) / parameter.rows)

    def padded(self, sizes: Iterable[tuple[int, Parameter]]) -> int:
        """Return the bytes of tensors along parameters with all shards as large as the largest."""
        return sum(self.devices * self.part(size, parameter) for size, parameter in sizes)

    def groups(self, parameters: Iterable[Parameter]) -> list[list[Parameter]]:
        """Return the parameters that are gathered together: those outside of all blocks, then those of each block."""
        found: dict[str, list[Parameter]] = {block: [] for block in ("", *self.blocks)}
        for parameter in parameters:
            inside = (block for block in self.blocks if parameter.name.startswith(f"{block}."))
            found[next(inside, "")].append(parameter)
        return list(found.values())


@dataclass(frozen=True)
class Memory:
    """Bytes on a device, on the one that holds most.

    Attributes:
        values: parameters, of sparse layers their stored blocks.
        optimizer: state of the optimizer.
        index: where the blocks are; whole on every device.
        buffers: other buffers of the model.
        communication: DDP's buckets, as large as the gradients; of FSDP2 what is gathered at once: the parameters
            outside of blocks, those of two blocks, and the gradients of one.
        step: what a step holds at its peak besides: activations, gradients as far as they exist then, temporaries.
        activations: of these, what the forward saves for the backward.
        gradients: all gradients, at the end of the backward. Not a part of ``total``: see ``step``.
    """

    values: int
    optimizer: int
    index: int
    buffers: int
    communication: int
    step: int
    activations: int
    gradients: int

    @property
    def total(self) -> int:
        """Bytes at the peak of a step."""
        return self.values + self.optimizer + self.index + self.buffers + self.communication + self.step


def memory(trace: Trace, layout: Layout, accumulate: int = 1) -> Memory:
    """Return the bytes that a device holds.

    Args:
        trace: of a step on a device's part of the batch.
        layout: of the model over the devices.
        accumulate: passes whose gradients add up before the optimizer's step.
    """
    parameters = trace.parameters
    gradients = sum(p.gradient for p in parameters)
    mine = sum(layout.part(p.gradient, p) for p in parameters)
    communication = 0
    if layout.strategy == "ddp" and layout.devices > 1:
        communication = gradients
    if layout.sharded and layout.devices > 1:
        root, *blocks = layout.groups(parameters)
        largest = sorted((sum(p.bytes for p in block) for block in blocks), reverse=True)[:2]
        communication = sum(p.bytes for p in root) + sum(largest)
        communication += max((sum(p.gradient for p in group) for group in (root, *blocks)), default=0)
    return Memory(
        values=sum(layout.part(p.bytes, p) for p in parameters),
        optimizer=sum(layout.part(p.state, p) for p in parameters),
        index=trace.index,
        buffers=trace.buffers,
        communication=communication,
        step=trace.peak(mine / max(1, gradients), accumulate > 1),
        activations=trace.saved,
        gradients=mine,
    )


@dataclass(frozen=True)
class Updates:
    """What an update of the topology computes and sends, and how often there is one.

    Attributes:
        every: steps between two updates; 0 for a method that never moves a block.
        moved: fraction of the blocks that an update moves.
        ranked: whether blocks are ranked by their values.
        candidates: absent blocks, over the stored ones, whose gradients are computed and added up over devices.
        score_sketches: numbers of each candidate that are added up; 0 for its whole gradient.
        scores_all: whether the whole gradient is computed, to score every place; it is never stored.
        sketches: numbers a place from which candidates are chosen. They are added up over devices; with
            ``score_sketches`` each device names its candidates instead.
        masked: the part of the stored blocks with which a pass computes.
        trained: the part whose gradient it computes.
        forwards: forward passes of a step beyond the first.
    """

    every: int = 0
    moved: float = 0.0
    ranked: bool = False
    candidates: float = 0.0
    score_sketches: int = 0
    scores_all: bool = False
    sketches: int = 0
    masked: float = 1.0
    trained: float = 1.0
    forwards: float = 0.0


@dataclass(frozen=True)
class Traffic:
    """Bytes that a device sends.

    Attributes:
        gradients: in a step, to add up gradients.
        gathers: in a step, to gather parameters.
        scores: in an update, to score blocks and candidates.
        moves: in an update, to agree on the blocks that move.
        every: steps between two updates; 0 for none.
        buffers: in a forward, places, index and other buffers, which DDP copies from the first device unless
            ``forward_sync_buffers=False``, as the command trains. Not a part of ``step``.
    """

    gradients: int = 0
    gathers: int = 0
    scores: int = 0
    moves: int = 0
    every: int = 0
    buffers: int = 0

    @property
    def step(self) -> float:
        """Bytes of a step, updates included by their share."""
        return self.gradients + self.gathers + ((self.scores + self.moves) / self.every if self.every else 0)


def traffic(
    parameters: Sequence[Parameter], layout: Layout, updates: Updates, accumulate: int = 1, buffers: int = 0
) -> Traffic:
    """Return the bytes that a device sends.

    DDP adds the gradients up once a step. FSDP2 gathers the parameters of each block in the forward and again in the
    backward of every pass, those outside of blocks once, and scatters the sums of the gradients of every pass.

    Args:
        parameters: of the model.
        layout: of the model over the devices.
        updates: of the topology.
        accumulate: passes of a step.
        buffers: bytes of all buffers of the model, the index included.
    """
    n = layout.devices
    if n == 1:
        return Traffic(every=updates.every)
    ring = (n - 1) / n
    if layout.sharded:
        root, *blocks = layout.groups(parameters)
        inside = layout.padded((p.bytes, p) for block in blocks for p in block)
        gathers = accumulate * ring * (layout.padded((p.bytes, p) for p in root) + 2 * inside)
        sums = accumulate * ring * layout.padded((p.gradient, p) for p in parameters)
    else:
        gathers, sums = 0.0, 2 * ring * sum(p.gradient for p in parameters)
    scores = moves = 0.0
    layers = [p for p in parameters if updates.every and p.slots and p.gradient]
    for p in layers:
        if updates.ranked and layout.sharded:
            scores += ring * layout.padded([(SCORE * p.slots, p)])
        named = updates.sketches and updates.score_sketches
        if updates.sketches and not named:
            scores += SCORE * p.cells * (2 * ring * updates.sketches + 1)
        if updates.candidates:
            chosen = min(math.ceil(updates.candidates * p.slots), p.cells - p.slots)
            numbers = min(p.block, updates.score_sketches or p.block)
            scores += n * math.ceil(chosen / n) * ring * (SCORE * (numbers + 1) + (KEY if named else 0))
        moves += MOVE * math.floor(updates.moved * p.slots) + LAYER
    if layers:
        moves += 2 * ring * (AGREEMENT + FLAG * (bool(updates.candidates) + bool(updates.sketches)))
    copied = 0 if layout.sharded else buffers
    return Traffic(round(sums), round(gathers), round(scores), round(moves), updates.every, copied)


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
    passes = [_masked(calls, updates.masked, updates.trained) for calls in (trace.forward, trace.backward)]
    forward, backward = (_seconds(calls, clocked) for calls in passes)
    seconds: dict[str, float] = _seconds(trace.update, clocked)
    for pass_, times in ((forward, accumulate * (1 + updates.forwards)), (backward, accumulate)):
        seconds = {group: seconds[group] + times * spent for group, spent in pass_.items()}
    sent = traffic(trace.parameters, layout, updates, accumulate, trace.index + trace.buffers)
    hidden = accumulate * sum(backward.values()) + (accumulate * sum(forward.values()) if layout.sharded else 0.0)
    seconds[UPDATES] = _update_seconds(trace, clocked, updates) * accumulate / max(1, updates.every)
    seconds[COMMUNICATION] = max(0.0, sent.step / sends - hidden)
    flops = [sum(op.flops * n for op, n in calls.items()) for calls in passes]
    return Prediction(
        flops=round(accumulate * ((1 + updates.forwards) * flops[0] + flops[1])),
        memory=memory(trace, layout, accumulate),
        traffic=sent,
        seconds={part: seconds.get(part, 0.0) for part in PARTS},
    )


def _masked(calls: Calls, masked: float, trained: float) -> Calls:
    """Return calls that compute with a part of the blocks, and the gradient of another part."""
    parts = {"dvalues": trained, "backward": (masked + trained) / 2}
    found: Calls = Counter()
    for operation, count in calls.items():
        if operation.group == SPARSE:
            operation = operation.scaled(parts.get(operation.kind.rpartition(" ")[2], masked))
        found[operation] += count
    return found


def _seconds(calls: Calls, clocked: Clocked) -> dict[str, float]:
    """Return the seconds of calls by group."""
    spent = dict.fromkeys(GROUPS, 0.0)
    for operation, count in calls.items():
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
