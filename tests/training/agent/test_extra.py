"""What extra passes cost."""

from __future__ import annotations

import warnings

import torch

import sparsekern as sk
from sparsekern.training.agent.extra import ExtraCost


def test_a_pass_is_counted_once_a_kind_until_a_recount():
    layer, cost = sk.SparseLinear(64, 64, block_size=16, sparsity=0.5), ExtraCost()
    flops = 2 * 64 * 32
    for rows in (1, 5):
        with cost.counted("a"):
            layer(torch.randn(rows, 64))
    assert cost.flops == 2 * flops
    cost.recount()
    with cost.counted("a"), cost.timed():
        layer(torch.randn(5, 64))
    assert cost.flops == 7 * flops and cost.seconds > 0
    other = ExtraCost()
    other.load_state_dict(cost.state_dict())
    with other.counted("a"):
        pass
    assert other.flops == 12 * flops and other.seconds == cost.seconds


def test_a_compiled_model_is_counted_as_the_plain_one():
    layer, cost = sk.SparseLinear(64, 64, block_size=16, sparsity=0.5), ExtraCost()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = torch.randn(5, 64)
    with warnings.catch_warnings(record=True) as heard, cost.counted("a"):
        y = compiled(x)
    assert cost.flops == 5 * 2 * 64 * 32 and not heard
    with cost.counted("a"):
        assert torch.equal(compiled(x), y)
