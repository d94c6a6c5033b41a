"""Seconds of a step and what they are spent on, against numbers worked out by hand."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from sparsekern.analysis.plan import PARTS, Layout, Trace, Updates, largest, predict
from sparsekern.analysis.plan.machine import DENSE, OPTIMIZER, OTHER, SPARSE, Operation
from sparsekern.analysis.plan.trace import Parameter

FORWARD = Operation(SPARSE, "sparse linear 16x16 forward", 100, 10.0, flops=1000)
BACKWARD = Operation(SPARSE, "sparse linear 16x16 backward", 200, 10.0, flops=2000)
NORM = Operation(OTHER, "native_layer_norm", 10, bytes=40)
ADAMW = Operation(OPTIMIZER, "_fused_adamw_", 10, bytes=40)
HEAD = Operation(DENSE, "mm", 10, 1.0, flops=20)

LAYER = Parameter("0.values", rows=4, bytes=4096, gradient=4096, state=8192, slots=4, block=256, cells=16)
TRACE = Trace(
    forward=Counter({FORWARD: 2, NORM: 1, HEAD: 1}),
    backward=Counter({BACKWARD: 2}),
    update=Counter({ADAMW: 1}),
    parameters=(LAYER,),
    index=100,
    buffers=0,
    saved=1000,
    peaks=((0, 1000), (4096, 500)),
)


class Clock:
    """A multiply-add of a sparse product takes a second, any other operation one."""

    def seconds(self, operation: Operation) -> float:
        return operation.elements * operation.intensity if operation.group == SPARSE else 1.0


def seconds(**more):
    return {part: spent for part, spent in predict(TRACE, Clock(), **more).seconds.items() if spent}


def test_a_step_on_one_device():
    assert seconds() == {"sparse products": 6000, "dense products": 1, "other": 1, "optimizer": 1}
    found = predict(TRACE, Clock())
    assert found.step_seconds == 6003 and list(found.seconds) == list(PARTS)
    assert found.flops == 2 * 1000 + 20 + 2 * 2000
    assert found.memory.total == 4096 + 8192 + 100 + 4596


def test_passes_that_accumulate_repeat_all_but_the_optimizer():
    spent = seconds(accumulate=3)
    assert spent == {"sparse products": 18_000, "dense products": 3, "other": 3, "optimizer": 1}


def test_candidates_and_dense_scores_cost_their_share_of_half_a_backward():
    assert seconds(updates=Updates(every=10, candidates=1.0))["updates of the topology"] == 4000 / 2 / 10
    assert seconds(updates=Updates(every=10, scores_all=True))["updates of the topology"] == 4 * 4000 / 2 / 10
    assert "updates of the topology" not in seconds(updates=Updates(every=10, moved=0.3, ranked=True))


def test_masked_passes_compute_with_a_part_of_the_blocks():
    updates = Updates(every=100, masked=0.5, trained=0.5, forwards=1.0)
    assert seconds(updates=updates) == {
        "sparse products": 1000 * 2 + 2000,
        "dense products": 2,
        "other": 2,
        "optimizer": 1,
    }
    assert predict(TRACE, Clock(), updates=updates).flops == 2 * (1000 + 20) + 2000


def test_gradients_of_all_blocks_beside_passes_with_a_part():
    updates = Updates(every=100, masked=0.5)
    found = predict(TRACE, Clock(), updates=updates)
    assert found.seconds["sparse products"] == 1000 + 1000 + 2000 and found.flops == 1000 + 20 + 1000 + 2000
    one = Operation(SPARSE, "sparse linear 16x16 dvalues", 100, 10.0, flops=1000)  # of a layer whose input is data
    assert predict(replace(TRACE, backward=Counter({one: 1})), Clock(), updates=updates).flops == 1000 + 20 + 1000


def test_communication_that_computing_does_not_hide():
    sent = 2 * 4096 // 2
    assert seconds(layout=Layout("ddp", 2), sends=0.1)["communication"] == pytest.approx(sent / 0.1 - 4000)
    assert "communication" not in seconds(layout=Layout("ddp", 2), sends=100.0)
    sharded = seconds(layout=Layout("fsdp2", 2), sends=0.1)["communication"]
    assert sharded == pytest.approx(4096 / 0.1 - 6002)  # gathered once and scattered once, under the whole pass


@pytest.mark.parametrize("fits", [0, 1, 7, 123])
@pytest.mark.parametrize("bend", [0, 3])
def test_the_largest_size(fits, bend):
    def total(size):
        return 100 + 10 * size + bend * size**2

    assert largest(total, total(fits) + 5, (2, 4, 6)) == fits


def test_nothing_fits():
    assert largest(lambda size: 1000 + size, 500, (1, 2, 3)) == 0
